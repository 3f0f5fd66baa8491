"""Draws kernel times over the batch, from the rows of a CSV file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot

from benchmarks.figures import save

Row = Mapping[str, object]


def draw_over_batch(
    rows: Sequence[Row],
    panel: Callable[[Row], str | None],
    line: Callable[[Row], str],
    file: Path,
) -> None:
    """Draw the median time of a call over the batch, one panel beside the other.

    Args:
        rows: as the benchmarks make them, with columns batch, us, us_p10 and us_p90.
        panel: title of the panel that a row belongs to, None for a row not drawn.
        line: name of the row's line.
        file: the picture to write.
    """
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if (title := panel(row)) is not None:
            panels.setdefault(title, {}).setdefault(line(row), []).append(row)
    size = 4.5 * len(panels), 4.0
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for name, points in lines.items():
            batches = [row["batch"] for row in points]
            low, mid, high = (
                [row[column] for row in points] for column in ("us_p10", "us", "us_p90")
            )
            axes.plot(batches, mid, marker="o", markersize=3, label=name)
            axes.fill_between(batches, low, high, alpha=0.2)
        axes.set_title(title, fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("requests in the batch")
        axes.set_ylabel("time of a call (µs)")
        axes.legend(fontsize="small")
    save(figure, file)
