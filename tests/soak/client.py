"""Runs `vllm bench serve` again and again in one process.

Each line read is the arguments of a run, as JSON; a line is written when it is ready
for the first, and when one is done.
The command itself would be imported anew for each run, for longer than the run takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterable

from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

READY, DONE = "ready", "done"


def run_all(lines: Iterable[str]) -> None:
    """Do what `vllm bench serve` does with the arguments of each line."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    print(READY, flush=True)
    for line in lines:
        with contextlib.redirect_stdout(sys.stderr):
            asyncio.run(main_async(parser.parse_args(json.loads(line))))
        print(DONE, flush=True)


if __name__ == "__main__":
    run_all(sys.stdin)
