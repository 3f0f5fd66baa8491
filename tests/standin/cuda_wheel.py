"""Hold vLLM's CUDA wheel to what its CPU build answers, on a machine without a GPU.

    python -m standin.cuda_wheel PYTHON

run in the folder tests, by the Python of `make setup`. PYTHON is the interpreter of an
environment with vLLM's CUDA wheel, vllm-avl and its benchmarks, and numpy below 2.4:
Triton 3.6's interpreter breaks on later ones. Where it needs more in PYTHONPATH, a
script that adds it and ends in `exec python "$@"` is a PYTHON too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from standin import checkpoint
from standin.asks import (
    ALL,
    BACKEND,
    ORDERS,
    SPEC,
    answer_on_cpu,
    check,
    check_orders,
    spec,
)
from standin.process import GRAPHS, generate

EAGER = (("v1", "none"), ("v2", "one"))
IN_GRAPHS = (("v1", "one"), ("v2", "none"), ("v2", "many"))


def like_the_cpu(
    model: Path, expected: dict[str, Any], python: str, runner: str, lists: str
) -> None:
    """Batched, alone, and over each other's prefix: the CPU back end's answers."""
    asked = spec(lists) | {"orders": ORDERS}
    options = ("--runner", runner, "--alone", *BACKEND)
    report = generate(model, asked, *options, python=python)
    check(report, expected)
    assert report["alone"] == report["tokens"]
    check_orders(report, expected["tokens"])
    say(
        f"{runner} {lists}: {len(report['tokens'])} requests, {len(ORDERS)} orders",
        f"prefix hits {[order['hits'] for order in report['orders']]}",
    )


def in_graphs(
    model: Path, expected: dict[str, Any], python: str, runner: str, lists: str
) -> None:
    """The same from replayed graphs."""
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    options = ("--runner", runner, *BACKEND)
    report = generate(model, spec(lists, **settings), *options, python=python)
    check(report, expected)
    say(f"{runner} {lists}: graphs", report["graphs"])


def like_stock(model: Path, python: str, runner: str) -> None:
    """All ratios 1: the answers of TRITON_ATTN."""
    plain = [{**request, "xargs": {}} for request in SPEC["requests"]]
    asked = {"requests": plain, "llm": SPEC["llm"] | {"additional_config": {}}}
    options = ("--runner", runner, "--logprobs", "--backend")
    stock = generate(model, asked, *options, "TRITON_ATTN", python=python)
    asked["llm"] |= {"additional_config": {"avl": ALL}}
    ours = generate(model, asked, *options, "AVL", python=python)
    assert ours["ran"]["backend"] != stock["ran"]["backend"]
    assert ours["tokens"] == stock["tokens"]
    assert ours["logprobs"] == stock["logprobs"]
    say(f"{runner}: all ratios 1 as TRITON_ATTN", ours["versions"])


def say(*what: object) -> None:
    """Print a line that shows when it was printed."""
    print(f"{time.monotonic() - STARTED:.0f} s", *what, flush=True)


STARTED = time.monotonic()


def main() -> None:
    """Run all of it; the first difference ends it."""
    (python,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.build(Path(folder) / "llava")
        expected = answer_on_cpu(model)
        say("the CPU build has answered", expected["versions"])
        for runner, lists in EAGER:
            like_stock(model, python, runner)
            like_the_cpu(model, expected, python, runner, lists)
        for runner, lists in IN_GRAPHS:
            in_graphs(model, expected, python, runner, lists)


if __name__ == "__main__":
    main()
