"""Builds one checkpoint from the command line."""

import argparse
from dataclasses import fields
from pathlib import Path

from benchmarks.testing.models import MODELS, ModelSize, build


def main() -> None:
    """Builds what the arguments ask for and prints its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.testing.models",
        description="Write a small random-weight checkpoint that stock vLLM serves.",
    )
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for field in fields(ModelSize):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=int,
            default=field.default,
            help="default: %(default)s",
        )
    args = parser.parse_args()
    try:
        size = ModelSize(**{f.name: getattr(args, f.name) for f in fields(ModelSize)})
        print(build(args.name, args.out, size, args.seed))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
