"""What the benchmarks of kernels on a GPU have in common: options, gate, rows."""

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

from benchmarks.harness import Report
from benchmarks.kernels import timing
from benchmarks.kernels.ways import Workload
from benchmarks.testing.interpreted import interpreted

NO_DEVICE = "no CUDA device: nothing was measured"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class Kernels:
    """What a script measures and how it reports.

    Attributes:
        name: of the CSV file and of the plot.
        modules: whose kernels `--interpret` interprets.
        baselines: the ways that all others are compared with.
        cases: sizes to measure with: dataclasses, whose fields are columns.
        build: makes the workload of a case.
        finish: completes the rows of a case, in place.
        shown: whether a row is printed; the CSV file has all.
        draw: draws all rows to a file, if there is a plot.
    """

    name: str
    modules: tuple[ModuleType, ...]
    baselines: tuple[str, ...]
    cases: Callable[[argparse.Namespace], list[Any]]
    build: Callable[[Any, torch.device], Workload]
    finish: Callable[[list[dict]], None] = lambda rows: None
    shown: Callable[[Mapping], bool] = lambda row: True
    draw: Callable[[Sequence[Mapping], Path], None] | None = None

    def measure(self, args: argparse.Namespace, report: Report) -> None:
        """Check and measure all cases.

        Raises:
            SystemExit: there is no GPU (code 2), or our own result is wrong.
        """
        with kernels_runnable(args, self.modules) as device:
            facts = {} if args.interpret else measured_on(args)
            rows, missing = [], {}
            for case in tqdm(self.cases(args), unit="case", disable=None):
                torch.manual_seed(args.seed)
                workload = self.build(case, device)
                workload.keep_correct()
                missing |= workload.missing
                if not args.interpret:
                    found = self._times(case, workload, facts, args.rounds)
                    report.keep(f"kernels_{self.name}", facts, found)
                    rows += found
        for name, why in missing.items():
            print(f"not measured: {name}: {why}")
        if args.interpret:
            print("interpreted: no times")
            return
        constant = {k: v for k, v in rows[0].items() if len({r[k] for r in rows}) == 1}
        shown = [
            {name: value for name, value in row.items() if name not in constant}
            for row in rows
            if self.shown(row)
        ]
        report.show(self.name, {**facts, **constant}, shown)
        if self.draw:
            report.draw(f"kernels_{self.name}", self.draw, rows)

    def _times(
        self, case: Any, workload: Workload, facts: Mapping[str, Any], rounds: int
    ) -> list[dict]:
        """Return the rows of one case."""
        times = timing.measure(workload.ways, rounds)
        bandwidth = 1e9 * facts["copy_gb_per_s"]
        rows = timing.summarize(workload.ways, times, bandwidth, self.baselines)
        rows = [{**columns(case), **row} for row in rows]
        self.finish(rows)
        return rows


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Declare what all have that measure on a GPU."""
    add = parser.add_argument
    add("--rounds", type=int, default=50, help="replays of each way, in turn")
    add("--seed", type=int, default=0, help="of the data")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the data")
    add(
        "--interpret",
        action="store_true",
        help="check results in Triton's interpreter, tiny, in fp32; no GPU, no times",
    )


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
