"""Draws accuracy over the KV cache that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot

from benchmarks.figures import save

Row = Mapping[str, str]
MARKERS = "osD^vPx"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw one axes a task: a line a policy, stock at its end, blind as a line below.

    Args:
        rows: of the CSV, of one model and number of questions.
        file: of the picture.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = pyplot.subplots(
        2, -(-len(tasks) // 2), figsize=(11, 6.5), sharex=True, squeeze=False
    )
    for axes, task in zip(grid.flat, tasks, strict=False):
        _draw_task(axes, [row for row in rows if row["task"] == task])
        axes.set_title(f"{task} ({_unit(task)})", fontsize="medium")
    for axes in grid.flat[len(tasks) :]:
        axes.remove()
    for axes in grid[-1]:
        axes.set_xlabel("KV bytes held, of stock's")
    grid.flat[0].legend(fontsize="x-small")
    save(figure, file)


def _draw_task(axes: pyplot.Axes, rows: Sequence[Row]) -> None:
    full = next(row for row in rows if row["name"] == "full")

    def share(row: Row) -> float:
        return float(row["kv_bytes"]) / float(full["kv_bytes"])

    for control, style in (("full", "--"), ("blind", ":")):
        found = [row for row in rows if row["name"] == control]
        if found:
            score = float(found[0]["score"])
            axes.axhline(score, color="black", linestyle=style, label=control)
    policies = dict.fromkeys(row["name"] for row in rows if row["part"] == "store")
    for policy, marker in zip(policies, MARKERS, strict=False):
        line = [row for row in rows if (row["part"], row["name"]) == ("store", policy)]
        line = sorted([*line, full], key=share)
        shares = [share(row) for row in line]
        axes.plot(
            shares,
            [float(row["score"]) for row in line],
            marker=marker,
            markersize=4,
            label=policy,
        )
        axes.fill_between(
            shares,
            [float(row["low"]) for row in line],
            [float(row["high"]) for row in line],
            alpha=0.08,
        )
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0)


def _unit(task: str) -> str:
    return {"caption": "CIDEr x 100", "doc": "ANLS"}.get(task, "% exact")
