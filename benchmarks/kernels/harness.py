"""What the kernel benchmarks have in common: options, gate, measurement, report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from tqdm import tqdm

from benchmarks.kernels import timing
from benchmarks.kernels.ways import Workload
from benchmarks.report import RESULTS, append_rows, machine, print_heading, print_table
from benchmarks.testing.interpreted import interpreted

NO_DEVICE = "no CUDA device: nothing was measured"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class Benchmark:
    """A script: what it measures and how it reports.

    Attributes:
        name: of the CSV file and of the plot.
        modules: whose kernels `--interpret` interprets.
        baselines: the ways that all others are compared with.
        build: makes the workload of a case (a dataclass, whose fields are columns).
        finish: completes the rows of a case, in place.
        shown: whether a row is printed; the CSV file has all.
        draw: draws all rows to a file, if there is a plot.
    """

    name: str
    modules: tuple[ModuleType, ...]
    baselines: tuple[str, ...]
    build: Callable[[Any, torch.device], Workload]
    finish: Callable[[list[dict]], None] = lambda rows: None
    shown: Callable[[Mapping], bool] = lambda row: True
    draw: Callable[[Sequence[Mapping], Path], None] | None = None


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows the options all kernel benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=50, help="replays of each way, in turn (50)")
    add("--seed", type=int, default=0, help="of the data (0)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    add("--quick", action="store_true", help="small, a few rounds, no CSV row")
    add(
        "--interpret",
        action="store_true",
        help="check results in Triton's interpreter, tiny, in fp32; no GPU, no times",
    )
    add("--results", type=Path, default=RESULTS, help="folder of CSV and plots")
    return parser


def batches(largest: int) -> list[int]:
    """Return the powers of two up to `largest`."""
    return [2**i for i in range(largest.bit_length())]


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """Return the dtype to measure; the interpreter's bf16 dot is wrong."""
    return torch.float32 if args.interpret else DTYPES[args.dtype]


def share(fraction: float, count: int) -> int:
    """Return a fraction of `count`, rounded up."""
    # So that 0.3 of 10 is 3, whatever 0.3 is in binary.
    return math.ceil(round(fraction * count, 6))


def main(benchmark: Benchmark, cases: Sequence[Any], args: argparse.Namespace) -> None:
    """Check and measure all cases, print, append to the CSV and draw.

    Raises:
        SystemExit: there is no GPU (code 2), or our own result is wrong.
    """
    with kernels_runnable(args, benchmark.modules) as device:
        facts = {} if args.interpret else measured_on(args)
        rows, missing = [], {}
        for case in tqdm(cases, unit="case", disable=None):
            torch.manual_seed(args.seed)
            rows += run(benchmark, case, device, facts, missing, args)
    for name, why in missing.items():
        print(f"not measured: {name}: {why}")
    if args.interpret:
        print("interpreted: no times")
        return
    show(benchmark, rows, facts)
    if benchmark.draw:
        suffix = "-quick" if args.quick else ""
        benchmark.draw(rows, args.results / f"kernels_{benchmark.name}{suffix}.png")


def run(
    benchmark: Benchmark,
    case: Any,
    device: torch.device,
    facts: Mapping[str, Any],
    missing: dict[str, str],
    args: argparse.Namespace,
) -> list[dict]:
    """Check one case, measure it and append its rows; none if interpreted."""
    workload = benchmark.build(case, device)
    workload.keep_correct()
    missing |= workload.missing
    if args.interpret:
        return []
    times = timing.measure(workload.ways, args.rounds)
    bandwidth = 1e9 * facts["copy_gb_per_s"]
    rows = timing.summarize(workload.ways, times, bandwidth, benchmark.baselines)
    rows = [{**columns(case), **row} for row in rows]
    benchmark.finish(rows)
    if not args.quick:
        file = args.results / f"kernels_{benchmark.name}.csv"
        append_rows(file, [{**facts, **row} for row in rows])
    return rows


@contextmanager
def kernels_runnable(
    args: argparse.Namespace, modules: Sequence[ModuleType]
) -> Iterator[torch.device]:
    """Yield the device to work on, with kernels that run there."""
    if args.interpret:
        with interpreted(*modules):
            yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        raise SystemExit(2)
    yield torch.device("cuda")


def measured_on(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the times depend on besides the code."""
    return {
        **machine(),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "rounds": args.rounds,
        "copy_gb_per_s": timing.copy_bandwidth() / 1e9,
    }


def columns(case: Any) -> dict[str, Any]:
    """Return the fields of a case as CSV columns."""
    flat = {}
    for name, value in asdict(case).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {**flat, "dtype": str(case.dtype).removeprefix("torch.")}


def show(
    benchmark: Benchmark, rows: Sequence[Mapping], facts: Mapping[str, Any]
) -> None:
    """Print the table, and above it what is the same in all rows."""
    constant = {k: v for k, v in rows[0].items() if len({r[k] for r in rows}) == 1}
    print_heading(benchmark.name, {**facts, **constant})
    print_table(
        [
            {name: value for name, value in row.items() if name not in constant}
            for row in rows
            if benchmark.shown(row)
        ]
    )
