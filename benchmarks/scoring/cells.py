"""What the accuracy table is made of: policies and budgets, each a row of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POLICIES = ("avl", "h2o", "fastv", "snapkv", "streaming", "random")
DOWNSAMPLE = "downsample"
"""Not a policy but what users do: a smaller picture, answered by stock."""
NAMES = (*POLICIES, DOWNSAMPLE)
STORE_RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1)
CORE_RATIOS = (0.4, 0.3, 0.2, 0.1)
REFRESH_INTERVALS = (1, 8, 0)
READ_RATIOS = (0.1, 0.05)
"""Where nothing is evicted and little is read, as FastOCR does (arXiv 2605.17447)."""
TEXT_KEEP_RATIOS = (0.7, 0.5, 0.3)
WINDOWS = (1, 8, 16, 32)
STORED, CORE, INTERVAL = 0.5, 0.3, 3
"""Where one ratio is varied, the others stay here."""
STOCK = {"avl": 0}

Settings = tuple[tuple[str, Any], ...]
LARGEST: Settings = (("observation_window", 32), ("head_reduction", "max"))


@dataclass(frozen=True)
class Cell:
    """How all questions of a task are served once.

    Attributes:
        part: `control`, or the axis of the grid it is on.
        name: the control, or the policy.
        settings: of every request, as `vllm_xargs`.
        server: settings that only a server can have.
        pixels: share of its pixels that each picture is shown with.
    """

    part: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    server: Settings = ()
    pixels: float = 1

    @property
    def control(self) -> str:
        """Which pictures are shown, as `training.evaluate.questions` takes it."""
        return self.name if self.part == "control" else "full"

    @property
    def columns(self) -> dict[str, object]:
        """What tells the cell from the others, for the table."""
        get = self.settings.get
        return {
            "part": self.part,
            "name": self.name,
            "S": get("avl_store_ratio", self.pixels),
            "C": get("avl_core_ratio", get("avl_store_ratio", self.pixels)),
            "K": get("avl_refresh_interval", "-"),
            "T": get("avl_text_keep_ratio", 1),
            "window": dict(self.server).get("observation_window", "-"),
            "heads": dict(self.server).get("head_reduction", "-"),
        }


def grid() -> list[Cell]:
    """Return all cells: controls first, then each axis around the usual setting."""
    cells = [Cell("control", name, STOCK) for name in ("full", "blind", "shuffled")]
    cells += [
        Cell("store", policy, {"avl_policy": policy, "avl_store_ratio": ratio})
        for policy in POLICIES
        for ratio in STORE_RATIOS
    ]
    cells += [Cell("store", DOWNSAMPLE, STOCK, pixels=ratio) for ratio in STORE_RATIOS]
    core = {"avl_policy": "avl", "avl_store_ratio": STORED}
    for ratio in CORE_RATIOS:
        of_core = {"avl_core_ratio": ratio, "avl_refresh_interval": INTERVAL}
        cells.append(Cell("core", "avl", core | of_core))
    cells += [read(ratio, INTERVAL) for ratio in READ_RATIOS]
    for interval in REFRESH_INTERVALS:
        of_interval = {"avl_core_ratio": CORE, "avl_refresh_interval": interval}
        cells.append(Cell("interval", "avl", core | of_interval))
    for ratio in TEXT_KEEP_RATIOS:
        of_text = {"avl_policy": "avl", "avl_store_ratio": 1.0}
        cells.append(Cell("text", "avl", of_text | {"avl_text_keep_ratio": ratio}))
    return cells


def read(ratio: float, interval: int) -> Cell:
    """Return the cell that evicts nothing and reads a part."""
    settings = {"avl_policy": "avl", "avl_store_ratio": 1.0, "avl_core_ratio": ratio}
    return Cell("core", "avl", settings | {"avl_refresh_interval": interval})


def tuning_grid() -> list[Cell]:
    """Return what defaults are chosen from: which prompt rows score, and how."""
    ratios = [{"avl_store_ratio": ratio} for ratio in (STORED, 0.2)]
    ratios += [
        {
            "avl_store_ratio": STORED,
            "avl_core_ratio": CORE,
            "avl_refresh_interval": INTERVAL,
        }
    ]
    servers: list[Settings] = [(("observation_window", rows),) for rows in WINDOWS]
    servers += [LARGEST]
    cells = [Cell("control", "full", STOCK)]
    cells += [
        Cell("tuning", "avl", settings, server)
        for server in servers
        for settings in ratios
    ]
    cells += [read(ratio, k) for ratio in READ_RATIOS for k in (2, INTERVAL, 8)]
    cells += [
        Cell("tuning", "avl", {"avl_store_ratio": ratio}, server)
        for server in ((), LARGEST)
        for ratio in (0.45, 0.4, 0.35, 0.3)
    ]
    return cells


def quick_grid() -> list[Cell]:
    """Return one cell of each kind."""
    kinds: dict[tuple[str, str], Cell] = {}
    for cell in [*grid(), *tuning_grid()]:
        kinds.setdefault((cell.part, cell.name), cell)
    return [
        cell
        for cell in kinds.values()
        if cell.part != "store" or cell.name in ("avl", "random", DOWNSAMPLE)
    ]
