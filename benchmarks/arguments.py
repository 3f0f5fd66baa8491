"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from benchmarks.report import RESULTS
from benchmarks.testing.models import ModelSize

CHECKPOINTS = Path(__file__).parents[1] / ".cache" / "benchmarks"


def make_parser(description: str | None, size: ModelSize) -> argparse.ArgumentParser:
    """Return a parser that knows the shared options, with `size` for the model's."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="runs of each variant")
    add("--threads", type=int, default=1, help="that compute, on both sides")
    add("--seed", type=int, default=0, help="of the images")
    add("--quick", action="store_true", help="less than a minute, no CSV row")
    add("--results", type=Path, default=RESULTS, help="folder of CSV and plots")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the models")
    model = parser.add_argument_group("size of the random-weight model")
    for field in fields(ModelSize):
        flag = "--" + field.name.replace("_", "-")
        model.add_argument(
            flag, type=int, default=getattr(size, field.name), help="in ModelSize"
        )
    return parser


def model_size(args: argparse.Namespace) -> ModelSize:
    """Return the sizes given on the command line."""
    return ModelSize(**{f.name: getattr(args, f.name) for f in fields(ModelSize)})
