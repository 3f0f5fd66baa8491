"""Answers requests of every kind by `avl` on vLLM's engine: bf16, eager, one process.

    gpu_smoke.py            on a GPU
    gpu_smoke.py --standin  on the stand-in for one: fp32, a request with core

Passes if there is an answer to each, alone and in a batch, and every block came back.
How many tokens agree is printed: in bf16 a batch's size may change a rounding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from standin import checkpoint
from standin.asks import spec
from standin.process import generate

WITH_CORE = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Answer, and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--standin", action="store_true")
    args = parser.parse_args(argv)
    asked = spec("many", dtype="float32" if args.standin else "bfloat16")
    if args.standin:
        asked["requests"] = [asked["requests"][WITH_CORE] | {"max_tokens": 4}]
    where = () if args.standin else ("--gpu",)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.build(Path(folder) / "llava")
        report = generate(model, asked, "--backend", "AVL", "--alone", *where)
    pairs = zip(flat(report["tokens"]), flat(report["alone"]), strict=True)
    same = [batched == alone for batched, alone in pairs]
    print(report["ran"])
    print(report["versions"])
    print(f"{sum(same)} of {len(same)} tokens are the same alone and in a batch")


def flat(answers: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens of all answers."""
    return [token for tokens in answers for token in tokens]


if __name__ == "__main__":
    main()
