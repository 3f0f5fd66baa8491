"""Accuracy against the KV cache that is kept, for every policy and task.

The bundled model answers held-out questions through the real engine: stock, without
the pictures, with other pictures, with fewer pixels, and with every policy at every
budget. Each score has a 95 % bootstrap interval, as has its difference to stock's,
which is paired: question by question. Beside it stand the KV bytes that a request holds
while it is answered and the tokens per second of the run. The CSV is written cell by
cell, and what is in it is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from benchmarks.harness import Benchmark, Report, main
from benchmarks.report import append_rows, machine
from benchmarks.scoring.cells import (
    NAMES,
    STOCK,
    Cell,
    Settings,
    grid,
    quick_grid,
    tuning_grid,
)
from benchmarks.scoring.pictures import shrunk
from benchmarks.scoring.plot import Row, draw
from benchmarks.training.evaluate import ALL_TASKS, Question, questions, scores
from benchmarks.training.export import checksum
from vllm_avl.bundled import WEIGHTS
from vllm_avl.bundled.picture import NUM_PATCHES

if TYPE_CHECKING:
    from benchmarks.scoring.engine import Engine

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
SETTINGS = ("name", "S", "C", "K", "T", "window", "heads")
KEY = ("model", "first", "questions", "task", "part", *SETTINGS)
RESAMPLES = 2000
VALIDATION = 100_000
"""First question that settings are chosen by; the table asks those from 0 on."""


def measure(args: argparse.Namespace, report: Report) -> None:
    """Measure what is missing in the CSV; print the table and draw the plot."""
    file = args.results / ("tuning.csv" if args.tune else "accuracy.csv")
    model = {
        "model": checksum(args.model / "model.safetensors")[:8],
        "first": args.first,
        "questions": args.count,
    }
    if not args.only_table:
        measure_missing(args, file, model)
    wanted = {name: str(value) for name, value in model.items()}
    rows = [
        row
        for row in read(file)
        if row["task"] in args.tasks and wanted.items() <= row.items()
    ]
    if not rows:
        raise SystemExit(f"{file} has no row of {wanted}: measure without --only-table")
    if not args.tune:
        draw(rows, args.results / "accuracy.png")
    report.show("Accuracy over KV kept", model, tabulate(rows, _score))
    compared = [row for row in rows if row["diff_low"] or row["name"] == "full"]
    if any(row["diff_low"] for row in compared):
        title = "Less than full, with a paired interval"
        report.show(title, model, tabulate(compared, _difference))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", type=Path, default=WEIGHTS, help="folder of the checkpoint")
    add("--tasks", nargs="+", choices=ALL_TASKS, default=list(ALL_TASKS))
    add(
        "--policies",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        help="measured beside the controls",
    )
    add("--count", type=int, default=200, help="questions of each task")
    add(
        "--tune",
        action="store_true",
        help="vary which prompt rows score, and how, on a validation split; tuning.csv",
    )
    add("--only-table", action="store_true", help="measure nothing")


def check(args: argparse.Namespace) -> None:
    """Choose the cells, and the questions that they are asked."""
    args.first = VALIDATION if args.tune else 0
    args.grid = tuning_grid if args.tune else grid
    if args.quick:
        args.grid = quick_grid


def measure_missing(
    args: argparse.Namespace, file: Path, model: dict[str, object]
) -> None:
    """Answer the questions of every cell that the CSV lacks."""
    done = {tuple(row[name] for name in KEY) for row in read(file)}
    todo = [
        (task, cell)
        for task in args.tasks
        for cell in args.grid()
        if (cell.part == "control" or cell.name in args.policies)
        and _key({**model, "task": task, **cell.columns}) not in done
    ]
    # Drawing pictures takes as long as answering.
    asked = cache(partial(questions, count=args.count, first=args.first))
    facts = machine()
    with tqdm(total=len(todo), unit="cell", disable=None) as progress:
        for server in dict.fromkeys(cell.server for _, cell in todo):
            together = [work for work in todo if work[1].server == server]
            with _started(args.model, server) as engine:
                full: dict[str, list[float]] = {}
                for task in dict.fromkeys(task for task, _ in together):
                    # Else the first cell alone would pay for reading the pictures.
                    shown = asked(task, control="full")
                    served = engine.serve(shown, task, STOCK)
                    full[task] = scores(task, served.answers, shown)
                for task, cell in together:
                    progress.set_description(f"{task}: {cell.name}")
                    shown = shrunk(asked(task, control=cell.control), cell.pixels)
                    row = _measure_cell(engine, task, cell, shown, full[task])
                    append_rows(file, [{**facts, **model, **row}])
                    progress.update()


@contextmanager
def _started(model: Path, server: Settings) -> Iterator[Engine]:
    # It starts vLLM, which reads the environment above.
    from benchmarks.scoring.engine import Engine

    engine = Engine(model, dict(server))
    try:
        yield engine
    finally:
        engine.close()


def _measure_cell(
    engine: Engine,
    task: str,
    cell: Cell,
    asked: Sequence[Question],
    full: Sequence[float],
) -> dict[str, object]:
    served = engine.serve(asked, task, cell.settings)
    each = scores(task, served.answers, asked)
    low, high = interval(each)
    diff_low, diff_high = interval(np.subtract(each, full))
    # Of a model whose tokens follow from the pixels; this one has as many for any.
    tokens = fmean(NUM_PATCHES * len(question.images) for question in asked)
    gone = (1 - cell.pixels) * tokens * served.token_bytes
    return {
        "task": task,
        **cell.columns,
        "score": fmean(each),
        "low": low,
        "high": high,
        "diff_low": diff_low,
        "diff_high": diff_high,
        "kv_bytes": served.kv_bytes - gone,
        "tokens_per_s": served.tokens_per_second,
    }


def interval(each: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `each`."""
    if min(each) == max(each):
        return each[0], each[0]
    found = bootstrap(
        (each,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0
    )
    return found.confidence_interval.low, found.confidence_interval.high


def read(file: Path) -> list[Row]:
    """Return the rows of a CSV, none if it is not there."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def tabulate(
    rows: Sequence[Row], shown: Callable[[Row, Row], str]
) -> list[dict[str, object]]:
    """Return a row a cell: what is shown of its tasks, and means of KV and speed.

    Args:
        rows: of the CSV.
        shown: says it of a row and of `full` in the same task.
    """
    full = {row["task"]: row for row in rows if row["name"] == "full"}
    cells: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in SETTINGS), []).append(row)
    table = []
    for names, found in cells.items():
        of_task = {row["task"]: row for row in found}
        line: dict[str, object] = dict(zip(SETTINGS, names, strict=True))
        for task in full:
            row = of_task.get(task)
            line[task] = shown(row, full[task]) if row else ""
        for title, column in (("KV kept", "kv_bytes"), ("tokens/s", "tokens_per_s")):
            line[title] = f"{fmean(_ratio(row, full, column) for row in found):.2f}"
        table.append(line)
    return table


def _difference(row: Row, full: Row) -> str:
    if not row["diff_low"]:
        return ""
    less = float(row["score"]) - float(full["score"])
    low, high = float(row["diff_low"]), float(row["diff_high"])
    return f"{less:+.1f} [{low:+.1f}, {high:+.1f}]"


def _score(row: Row, full: Row) -> str:
    score, low, high = (float(row[name]) for name in ("score", "low", "high"))
    return f"{score:.1f} ±{(high - low) / 2:.1f}"


def _ratio(row: Row, full: dict[str, Row], column: str) -> float:
    return float(row[column]) / float(full[row["task"]][column])


def _key(values: dict[str, object]) -> tuple[str, ...]:
    """Return what the CSV has in the columns of KEY."""
    cells = [values[name] for name in KEY]
    return tuple(f"{c:g}" if isinstance(c, float) else str(c) for c in cells)


BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": {"count": 8}}, check)

if __name__ == "__main__":
    main(BENCHMARK)
