"""Draws what the benchmarks have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.figures import save
from benchmarks.runs import Run


def draw_concurrency(runs: Mapping[str, Run], file: Path) -> None:
    """Draw pool use and running requests over the scheduler's steps.

    Args:
        runs: one run of each variant, by its name.
        file: the picture to write.
    """
    figure, (pool, running) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5))
    for name, run in runs.items():
        pool.plot([100 * use for use in run.pool_use], label=name, linewidth=1)
        running.plot(run.running, label=name, linewidth=1)
    pool.set_ylabel("KV pool in use (%)")
    pool.set_ylim(0, 105)
    pool.legend()
    running.set_ylabel("running requests")
    running.set_ylim(0)
    running.set_xlabel("scheduler step")
    save(figure, file)


def draw_decode(times: Mapping[str, Sequence[tuple[int, float]]], file: Path) -> None:
    """Draw the median decode step over the context's length.

    Args:
        times: (tokens of a prompt, milliseconds) of each variant, by its name.
        file: the picture to write.
    """
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for (name, points), marker in zip(times.items(), "osD^v", strict=False):
        lengths, milliseconds = zip(*sorted(points), strict=True)
        axes.plot(lengths, milliseconds, marker=marker, label=name)
    axes.set_xlabel("tokens of each prompt")
    axes.set_ylabel("median decode step (ms)")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend()
    save(figure, file)


def draw_turns(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the time to a turn's first token, 10th to 90th percentile.

    Args:
        rows: of turns.csv, one for each number of pictures and turn.
        file: the picture to write.
    """
    counts = sorted({int(float(row["pictures"])) for row in rows})
    figure, (all_axes,) = pyplot.subplots(
        1, len(counts), squeeze=False, figsize=(4 * len(counts), 4)
    )
    for axes, count in zip(all_axes, counts, strict=True):
        of_count = [row for row in rows if int(float(row["pictures"])) == count]
        turns = [int(float(row["turn"])) for row in of_count]
        for name, marker in (("stock", "o"), ("avl", "s")):
            low, mid, high = (
                [float(row[f"{name}_ttft_ms{suffix}"]) for row in of_count]
                for suffix in ("_p10", "", "_p90")
            )
            errors = [_less(mid, low), _less(high, mid)]
            axes.errorbar(turns, mid, errors, marker=marker, capsize=3, label=name)
        axes.set_title(f"{count} picture{'s' if count > 1 else ''}")
        axes.set_xlabel("turn")
        axes.set_xticks(turns)
        axes.set_ylim(0)
    all_axes[0].set_ylabel("time to the first token (ms)")
    all_axes[0].legend()
    save(figure, file)


def draw_host_time(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw what each part of a decode step takes over stock's, 10th to 90th percentile.

    Args:
        rows: of host_time.csv, one a variant; the first is stock.
        file: the picture to write.
    """
    parts = ("builder", "before", "pass", "after", "step")
    figure, axes = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / (len(rows) - 1)
    for number, row in enumerate(rows[1:]):
        low, mid, high = (
            [float(row[f"{part}_over{suffix}"]) for part in parts]
            for suffix in ("_p10", "", "_p90")
        )
        places = [place + number * width for place in range(len(parts))]
        errors = [_less(mid, low), _less(high, mid)]
        axes.bar(places, mid, width, yerr=errors, capsize=3, label=row["variant"])
    middle = (len(rows) - 2) * width / 2
    axes.set_xticks([place + middle for place in range(len(parts))], parts)
    axes.set_ylabel("over stock's, per request and step (µs)")
    axes.legend()
    save(figure, file)


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]
