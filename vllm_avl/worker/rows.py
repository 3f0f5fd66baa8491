"""Which token lies in which stored slot of a layer, and which slots are core.

Slots count from the first stored block on: [private | partial block | answer]. Order
carries no meaning for attention, because the rotary position is inside the cached key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_avl.worker.history import CoreHistory


class Core(Protocol):
    """Which slots ordinary steps read, wherever that is kept."""

    def mask(self) -> torch.Tensor:
        """[num_rankings, num_slots] bool; all slots behind are read."""


@dataclass(frozen=True)
class Mask:
    """Core as a tensor."""

    slots: torch.Tensor
    """[num_rankings, num_slots] bool, contiguous; never changed."""

    def mask(self) -> torch.Tensor:
        """As `Core.mask`."""
        return self.slots


@dataclass
class LayerRows:
    """The rows one layer stores of one request; a column is a slot."""

    start: int
    """Tokens in front of the first slot: an appended row's position is `start` more
    than its slot."""
    positions: torch.Tensor
    """[num_rankings, num_slots] original position of each row, int64; num_rankings is 1
    until KV heads differ, then num_kv_heads. Replaced, never changed."""
    core: Core | None = None
    """None where every step reads all that stays."""
    sums: torch.Tensor | None = None
    """[num_kv_heads, num_slots] running sums of attention, fp32; NaN where a row has
    not been scored yet. None where nobody needs them."""
    history: CoreHistory = field(default_factory=CoreHistory)
    """Earlier selections, where they are remembered."""
    kept: torch.Tensor | None = None
    """[num_rankings, num_slots] bool, which slots stay, and all behind them do; None
    where all do. Replaced, never changed."""
    of_drafter: bool = False
    """Whether the layer is a drafter's, which no report tells of."""
    _competing: tuple[torch.Tensor, torch.Tensor] | None = None
    """The last answer of `competes`, and which positions it was for."""

    @property
    def num_slots(self) -> int:
        """Slots that are known; what was appended since is not."""
        return self.positions.shape[1]

    def extend(self, num_tokens: int) -> None:
        """Take the rows that steps have appended, up to a length of `num_tokens`."""
        end = self.start + self.num_slots
        if num_tokens == end:
            return
        new = torch.arange(end, num_tokens, device=self.positions.device)
        new = new.expand(len(self.positions), -1)
        self.positions = torch.cat([self.positions, new], 1)
        if self.sums is not None:
            unscored = self.sums.new_full((len(self.sums), new.shape[1]), torch.nan)
            self.sums = torch.cat([self.sums, unscored], 1)

    def add(self, attention: torch.Tensor) -> None:
        """Add one scoring, [num_kv_heads, num_slots], to the sums."""
        assert self.sums is not None
        self.sums = self.sums.nan_to_num(0.0) + attention

    def split_heads(self, num_kv_heads: int) -> None:
        """Let every KV head have rows of its own from now on."""
        if len(self.positions) < num_kv_heads:
            self.positions = self.positions.repeat(num_kv_heads, 1)

    def competes(self, tokens: torch.Tensor) -> torch.Tensor:
        """[num_rankings, num_slots], True where a policy ranks a slot that stays.

        Args:
            tokens: [num_tokens] bool by position; the last one stands for the rest.
        """
        if self._competing is None or self._competing[0] is not self.positions:
            index = self.positions.clamp(max=len(tokens) - 1)
            self._competing = self.positions, tokens[index]
        kept = self.stays()
        return self._competing[1] if kept is None else self._competing[1] & kept

    def stays(self) -> torch.Tensor | None:
        """[num_rankings, num_slots] which slots stay; None where all do."""
        return None if self.kept is None else self.over_slots(self.kept)

    def mask(self) -> torch.Tensor | None:
        """[num_rankings, num_slots] which slots are core; None where all are read."""
        return self.stays() if self.core is None else self.over_slots(self.core.mask())

    def over_slots(self, mask: torch.Tensor) -> torch.Tensor:
        """[num_rankings, num_slots] of a mask over the first slots; True behind it."""
        mask = mask.expand(len(self.positions), -1)
        num_appended = self.num_slots - mask.shape[1]
        if not num_appended:
            return mask
        return torch.nn.functional.pad(mask, (0, num_appended), value=True)

    def note_core(self, num_tokens: int, num_full_tokens: int) -> None:
        """Remember what is core now.

        Args:
            num_tokens: length of the request.
            num_full_tokens: tokens of its full prompt blocks; others are not ranked.
        """
        mask = self.mask()
        if mask is not None:
            self.history.note(num_tokens, self.positions, mask, num_full_tokens)

    def settle(self) -> None:
        """Keep what a report needs, and no more, of a request that has ended."""
        mask = self.mask()
        self.core = None if mask is None else Mask(mask.clone())
        self.kept = self.stays()
        self.sums = self._competing = None
        self.positions = self.positions.to(torch.int32)
