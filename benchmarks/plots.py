"""Draws what the benchmarks have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines import Run
from figures import save
from matplotlib import pyplot


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
