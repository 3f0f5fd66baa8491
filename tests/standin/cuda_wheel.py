"""Hold vLLM's CUDA wheel to what its CPU build answers, on a machine without a GPU.

    python -m standin.cuda_wheel PYTHON [--torch]

run in the folder tests, by the Python of `make setup`. PYTHON is the interpreter of an
environment with vLLM's CUDA wheel, vllm-avl and its benchmarks, and numpy below 2.4:
Triton 3.6's interpreter breaks on later ones. Where it needs more in PYTHONPATH, a
script that adds it and ends in `exec python "$@"` is a PYTHON too. With --torch vLLM's
Triton attention is the same function in torch, and all of it takes some 20 minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from standin import checkpoint
from standin.asks import (
    ALL,
    BACKEND,
    ORDERS,
    SPEC,
    TORCH,
    answer_on_cpu,
    check,
    check_orders,
    spec,
)
from standin.process import GRAPHS, generate

Wheel = Callable[..., dict[str, Any]]
"""Answers a specification on the wheel, see `generate`."""
EAGER = (("v1", "none"), ("v2", "one"))
IN_GRAPHS = (("v1", "one"), ("v2", "none"), ("v2", "many"))


def like_the_cpu(
    model: Path, expected: dict[str, Any], wheel: Wheel, runner: str, lists: str
) -> None:
    """Batched, alone, and over each other's prefix: the CPU back end's answers."""
    asked = spec(lists) | {"orders": ORDERS}
    options = ("--runner", runner, "--alone", *BACKEND)
    report = wheel(model, asked, *options)
    check(report, expected)
    assert report["alone"] == report["tokens"]
    check_orders(report, expected["tokens"])
    say(
        f"{runner} {lists}: {len(report['tokens'])} requests, {len(ORDERS)} orders",
        f"prefix hits {[order['hits'] for order in report['orders']]}",
    )


def in_graphs(
    model: Path, expected: dict[str, Any], wheel: Wheel, runner: str, lists: str
) -> None:
    """The same from replayed graphs."""
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    options = ("--runner", runner, *BACKEND)
    report = wheel(model, spec(lists, **settings), *options)
    check(report, expected)
    say(f"{runner} {lists}: graphs", report["graphs"])


def like_stock(model: Path, wheel: Wheel, runner: str) -> None:
    """All ratios 1: the answers of TRITON_ATTN."""
    plain = [{**request, "xargs": {}} for request in SPEC["requests"]]
    asked = {"requests": plain, "llm": SPEC["llm"] | {"additional_config": {}}}
    options = ("--runner", runner, "--logprobs", "--backend")
    stock = wheel(model, asked, *options, "TRITON_ATTN")
    asked["llm"] |= {"additional_config": {"avl": ALL}}
    ours = wheel(model, asked, *options, "AVL")
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
    parser = argparse.ArgumentParser(prog="python -m standin.cuda_wheel")
    parser.add_argument("python", help="with vLLM's CUDA wheel and the plug-in")
    parser.add_argument(
        "--torch", action="store_true", help="vLLM's attention in torch"
    )
    args = parser.parse_args()
    wheel = partial(generate, python=args.python, **(TORCH if args.torch else {}))
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.build(Path(folder) / "llava")
        expected = answer_on_cpu(model)
        say("the CPU build has answered", expected["versions"])
        for runner, lists in EAGER:
            like_stock(model, wheel, runner)
            like_the_cpu(model, expected, wheel, runner, lists)
        for runner, lists in IN_GRAPHS:
            in_graphs(model, expected, wheel, runner, lists)


if __name__ == "__main__":
    main()
