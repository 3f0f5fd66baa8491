"""The lines that the log shows: what is on, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_avl.config import AVLConfig
from vllm_avl.messages import Statistics
from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import Stock, key
from vllm_avl.plan import PICTURE_TOKENS, pictures_free


@dataclass
class Summary:
    """What all engines reported since the last line."""

    _counts: Counts = field(default_factory=Counts)
    _held: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Blocks held, and what stock would hold, by engine."""

    def add(self, message: Statistics, engine: int) -> None:
        """Take one engine's message."""
        self._counts.add(message.counts)
        levels = message.levels
        self._held[engine] = (
            int(levels[key("kv_blocks_held")]),
            int(levels[key("kv_blocks_stock")]),
        )

    def take_line(self) -> str | None:
        """Return what has happened since the last line; None where nothing has."""
        counts = self._counts.take()
        adapted = counts.get(key("requests_adapted"), 0)
        alone = {
            reason: number
            for reason in Stock
            if (number := counts.get(key("requests_left_alone", reason), 0))
        }
        if not adapted and not alone:
            return None
        reasons = ", ".join(f"{name} {number:.0f}" for name, number in alone.items())
        held = sum(held for held, _ in self._held.values())
        stock = sum(stock for _, stock in self._held.values())
        return (
            f"adapted {adapted:.0f} requests, left {sum(alone.values()):.0f} alone"
            f"{f' ({reasons})' if reasons else ''}; "
            f"freed {counts.get(key('blocks_freed_early'), 0):.0f} blocks early; "
            f"{held} blocks held now, {stock} without eviction"
        )


def describe_settings(config: AVLConfig) -> str:
    """Return what a server's settings mean, in a line."""
    parts = [
        f"adaptive attention is on: policy {config.policy}, engage {config.engage}",
        f"stores {config.store_ratio:g} of vision",
    ]
    if config.read_ratio < config.store_ratio and config.refresh_interval:
        parts.append(
            f"reads {config.read_ratio:g}, chosen every {config.refresh_interval} steps"
        )
    if config.text_keep_ratio < 1:
        parts.append(f"keeps {config.text_keep_ratio:g} of text")
    return ", ".join(parts)


def describe_blocks(config: AVLConfig, block_size: int) -> str:
    """Return what blocks of a size bring, in a line: large ones free little."""
    one, four = (
        "{} of {}".format(*pictures_free(number, block_size, config))
        for number in (1, 4)
    )
    return (
        f"blocks of {block_size} tokens: a prompt with a picture of {PICTURE_TOKENS} "
        f"tokens gives {one} blocks back, with four {four}"
    )
