"""What all benchmarks share: a command line, taking turns, and the report.

A script says in a `Benchmark` which options it has and how it measures. `main` reads
the command line and lets it measure; what it finds goes to a `Report`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from benchmarks.report import RESULTS, append_rows, machine, print_heading, print_table
from benchmarks.testing.models import ModelSize

CHECKPOINTS = Path(__file__).parents[1] / ".cache" / "benchmarks"
DTYPES = ("bfloat16", "float16", "float32")
NO_COLUMN = "$^"
Row = Mapping[str, Any]
Variant = TypeVar("Variant")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Benchmark:
    """A script.

    Attributes:
        description: for --help.
        measure: measures and reports.
        add_options: declares the script's own options, behind those that all have.
        presets: by the name of a flag, what other options are then by default; the
            last of several flags wins.
        check: completes what was read; its ValueError is shown as a wrong usage.
        size: of the random-weight model, if it has one: each size is an option.
    """

    description: str | None
    measure: Callable[[argparse.Namespace, Report], None]
    add_options: Callable[[argparse.ArgumentParser], None]
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    check: Callable[[argparse.Namespace], None] = lambda args: None
    size: ModelSize | None = None

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Read a command line."""
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=_Formatter
        )
        add = parser.add_argument
        add("--quick", action="store_true", help="small and short, no CSV row")
        add("--results", type=Path, default=RESULTS, help="folder of CSV and plots")
        if self.size:
            _add_engine_options(parser, self.size)
        self.add_options(parser)
        flags = parser.parse_known_args(argv)[0]
        for flag, defaults in self.presets.items():
            if getattr(flags, flag):
                parser.set_defaults(**defaults)
        args = parser.parse_args(argv)
        try:
            self.check(args)
        except ValueError as error:
            parser.error(str(error))
        return args


class _Formatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Leaves the description as it is, and says what an option is by default."""


def _add_engine_options(parser: argparse.ArgumentParser, size: ModelSize) -> None:
    """Declare what all have that serve a random-weight model in this process."""
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="runs of each variant")
    add("--threads", type=int, default=1, help="that compute, on both sides")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of both sides")
    add("--seed", type=int, default=0, help="of the images")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the models")
    model = parser.add_argument_group("size of the random-weight model")
    for one in fields(ModelSize):
        flag, default = "--" + one.name.replace("_", "-"), getattr(size, one.name)
        model.add_argument(flag, type=int, default=default, help="in ModelSize")


def model_size(args: argparse.Namespace) -> ModelSize:
    """Return the sizes given on the command line."""
    return ModelSize(**{one.name: getattr(args, one.name) for one in fields(ModelSize)})


class Report:
    """Where the results of one run go: CSV rows, tables on the screen, plots."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._results, self._quick = args.results, args.quick

    @cached_property
    def machine(self) -> dict[str, object]:
        """What a number depends on besides the code, when it is first asked for."""
        return machine()

    def add(
        self,
        name: str,
        title: str,
        facts: Row,
        rows: Sequence[Row],
        hidden: str = NO_COLUMN,
    ) -> None:
        """Append rows to NAME.csv and print them; see `keep` and `show`."""
        self.keep(name, facts, rows)
        self.show(title, facts, rows, hidden)

    def keep(self, name: str, facts: Row, rows: Sequence[Row]) -> None:
        """Append rows to NAME.csv, unless in a quick run.

        Args:
            name: of the file.
            facts: what all rows have in common, besides the machine; columns of theirs.
            rows: all of the same columns.
        """
        if not self._quick:
            file = self._results / f"{name}.csv"
            append_rows(file, [{**self.machine, **facts, **row} for row in rows])

    def show(
        self, title: str, facts: Row, rows: Sequence[Row], hidden: str = NO_COLUMN
    ) -> None:
        """Print a table without the columns in which `hidden`, a pattern, is found."""
        print_heading(title, {**self.machine, **facts})
        shown = [name for name in rows[0] if not re.search(hidden, name)]
        print_table([{name: row[name] for name in shown} for row in rows])

    def draw(self, name: str, draw: Callable[..., None], *data: object) -> None:
        """Let `draw(*data, file)` draw NAME.png; quick runs draw one of their own."""
        draw(*data, self._results / f"{name}{'-quick' if self._quick else ''}.png")


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says."""
    args = benchmark.parse(argv)
    benchmark.measure(args, Report(args))


def rotated(items: Sequence[Variant], count: int) -> list[Variant]:
    """Return `items` from another one on, so that none is always first."""
    start = count % len(items)
    return [*items[start:], *items[:start]]


def take_turns(
    variants: Iterable[Variant],
    repeats: int,
    run: Callable[[Variant, int], Found],
) -> dict[Variant, list[Found]]:
    """Run each variant once a repeat, another one first each time.

    Args:
        variants: what is compared.
        repeats: how often.
        run: runs a variant, told the repeat.

    Returns:
        what was found, by variant, in the order of the repeats.
    """
    order = list(variants)
    found: dict[Variant, list[Found]] = {variant: [] for variant in order}
    with tqdm(total=len(order) * repeats, unit="run", disable=None) as progress:
        for repeat in range(repeats):
            for variant in rotated(order, repeat):
                progress.set_description(str(variant))
                found[variant].append(run(variant, repeat))
                progress.update()
    return found
