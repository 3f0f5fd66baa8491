"""Whether memory is short: decides when requests are adapted with engage: pressure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_avl.config import AVLConfig

ENGAGE_AT = 0.8
"""Part of the pool that requests want, from which on they are adapted."""
RELEASE_BELOW = 0.6
"""Part of the pool below which they no longer are."""


@dataclass
class Pressure:
    """Engages where blocks are short, and lets go only well below that."""

    config: AVLConfig
    engaged: bool = False

    def __post_init__(self) -> None:
        self.engaged = self.config.engage == "always"

    def update(self, held: int, wanted: Iterable[int], num_blocks: int) -> bool:
        """Look at the pool before a request is planned.

        Args:
            held: blocks that requests hold.
            wanted: blocks that prompts still lack: of this request, of running ones, of
                those that could run next; read only as far as it matters.
            num_blocks: of the pool.

        Returns:
            whether the request is adapted.
        """
        if self.config.engage == "always":
            return True
        limit = RELEASE_BELOW if self.engaged else ENGAGE_AT
        demand = held
        for blocks in wanted:
            demand += blocks
            if demand >= limit * num_blocks:
                break
        self.engaged = demand >= limit * num_blocks
        return self.engaged
