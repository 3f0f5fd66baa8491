"""Draws what the benchmarks have measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from engines import Run
from matplotlib import pyplot

matplotlib.use("Agg")


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
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
