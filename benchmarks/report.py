"""Prints tables, appends CSV rows and names the machine they were measured on."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import cpuinfo
import torch

RESULTS = Path(__file__).parent / "results"
Run = TypeVar("Run")


def machine() -> dict[str, object]:
    """Return what a number depends on besides the code: CPU, cores and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "vllm": version("vllm"),
        "vllm_avl": version("vllm-avl"),
    }


def print_heading(title: str, facts: Mapping[str, object]) -> None:
    """Print a title and what it was measured on, one line each."""
    print(f"\n{title}")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same columns as a Markdown table."""
    columns = list(rows[0])
    cells = [columns, *([_text(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    print()
    for line in cells:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(padded)} |")


def append_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a CSV file of the same columns, with a header if it is new.

    Raises:
        ValueError: the file has other columns.
    """
    columns = list(rows[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    if not new:
        with file.open(newline="") as lines:
            found = next(csv.reader(lines))
        if found != columns:
            raise ValueError(f"{file.name} has columns {found}, not {columns}")
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({k: _text(v) for k, v in row.items()} for row in rows)


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return median, 10th and 90th percentile as columns that begin with `name`."""
    if len(values) == 1:
        return {name: values[0], f"{name}_p10": values[0], f"{name}_p90": values[0]}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        name: statistics.median(values),
        f"{name}_p10": deciles[0],
        f"{name}_p90": deciles[-1],
    }


def ratios(
    name: str,
    ours: Sequence[Run],
    theirs: Sequence[Run],
    value: Callable[[Run], float],
) -> dict[str, Any]:
    """Return `spread` of our value over theirs of the same turn."""
    pairs = zip(ours, theirs, strict=True)
    return spread(name, [value(a) / value(b) for a, b in pairs])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
