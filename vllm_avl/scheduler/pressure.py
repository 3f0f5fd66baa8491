"""Whether memory is short: decides when requests are adapted with engage: pressure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_avl.config import AVLConfig


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
        limit = self.config.release_pool_use
        if not self.engaged:
            limit = self.config.engage_pool_use
        demand = held
        for blocks in wanted:
            demand += blocks
            if demand >= limit * num_blocks:
                break
        self.engaged = demand >= limit * num_blocks
        return self.engaged
