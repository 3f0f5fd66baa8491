"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from report import RESULTS

from vllm_avl.testing.models import ModelSize

CHECKPOINTS = Path(__file__).parents[1] / ".cache" / "benchmarks"


def add_common(parser: argparse.ArgumentParser, repeats: int = 3) -> None:
    """Add what is no property of the workload."""
    add = parser.add_argument
    add("--repeats", type=int, default=repeats, help="runs of each variant")
    add("--seed", type=int, default=0, help="of the images")
    add("--quick", action="store_true", help="a minute's check, no CSV row")
    add("--results", type=Path, default=RESULTS, help="folder of CSV and plots")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the models")


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the random-weight model."""
    add = parser.add_argument
    add("--hidden-size", type=int, default=128, help="width of the language model")
    add("--intermediate-size", type=int, default=256, help="width of its MLP")
    add("--num-layers", type=int, default=2, help="its depth")
    add("--num-heads", type=int, default=2, help="its query heads")
    add("--num-kv-heads", type=int, default=1, help="its KV heads")
    add("--head-size", type=int, default=64, help="elements a head has")
    add("--vocab-size", type=int, default=32064, help="rows of the output layer")


def size(args: argparse.Namespace) -> ModelSize:
    """Return the sizes given on the command line."""
    return ModelSize(
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_size=args.head_size,
    )
