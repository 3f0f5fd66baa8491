"""Which token lies in which stored slot, and how rows are put in order.

A request's stored slots are two regions: secondary, then core with the text. Order
inside a region carries no meaning, because the rotary position is inside the cached
key; so a rearrangement moves only rows that are in the wrong region.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EVICTED, SECONDARY, CORE = 0, 1, 2
"""Labels of rows. CORE also means what is always read: text, the partial block."""


@dataclass
class LayerRows:
    """The rows one layer stores of one request; a column is a slot."""

    start: int
    """Position in the request's block table, in tokens, of the first slot."""
    positions: torch.Tensor
    """[num_rankings, num_slots] original position of each row, int64; num_rankings is 1
    until KV heads differ, then num_kv_heads."""
    sums: torch.Tensor | None = None
    """[num_kv_heads, num_slots] running sums of attention, fp32; NaN where a row has
    not been scored yet. None where nobody needs them."""

    @property
    def end(self) -> int:
        """Length of the request, in tokens."""
        return self.start + self.positions.shape[1]

    def extend(self, num_tokens: int) -> None:
        """Take the rows that decode steps have appended, up to `num_tokens`."""
        if num_tokens == self.end:
            return
        # An appended row lies at its own position.
        new = torch.arange(self.end, num_tokens).expand(len(self.positions), -1)
        self.positions = torch.cat([self.positions, new], 1)
        if self.sums is not None:
            unscored = self.sums.new_full((len(self.sums), new.shape[1]), torch.nan)
            self.sums = torch.cat([self.sums, unscored], 1)

    def add(self, probabilities: torch.Tensor, decay: float) -> None:
        """Add one scoring to the sums, which have faded by `decay` since the last.

        Args:
            probabilities: [num_kv_heads, num_slots].
            decay: what the sums keep.
        """
        assert self.sums is not None
        self.sums = self.sums.nan_to_num(0.0) * decay + probabilities

    def split_heads(self, num_kv_heads: int) -> None:
        """Let every KV head have an order of its own from now on."""
        if len(self.positions) < num_kv_heads:
            self.positions = self.positions.repeat(num_kv_heads, 1)


def rearrange(
    rows: LayerRows, labels: torch.Tensor, start: int, core_start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Find the moves after which the regions hold what their rows are labelled.

    `rows` is updated to the state after the moves.

    Args:
        rows: the layer's rows.
        labels: [num_rankings, num_slots]; in every ranking, SECONDARY fits the slots
            [start, core_start) and CORE those behind.
        start: first slot, in tokens of the request, that stays stored.
        core_start: first slot of core.

    Returns:
        source and target slots, in tokens of the request, and the KV head of each
        move; None where all heads move alike. All int64 `[num_moved]`.
    """
    slots = torch.arange(rows.start, rows.end)
    in_core = slots >= core_start
    in_secondary = (slots >= start) & ~in_core
    # In each ranking as many rows of a label are out of place as there are holes.
    source = torch.cat(
        [
            ((labels == CORE) & ~in_core).nonzero(),
            ((labels == SECONDARY) & ~in_secondary).nonzero(),
        ]
    )
    target = torch.cat(
        [
            ((labels != CORE) & in_core).nonzero(),
            ((labels != SECONDARY) & in_secondary).nonzero(),
        ]
    )
    old, new = source.unbind(1), target.unbind(1)
    rows.positions[new] = rows.positions[old]
    if rows.sums is not None:
        _move_sums(rows.sums, old, new, len(labels))
    first = start - rows.start
    rows.positions = rows.positions[:, first:].clone()
    if rows.sums is not None:
        rows.sums = rows.sums[:, first:].clone()
    offset, rows.start = rows.start, start
    heads = old[0] if len(labels) > 1 else None
    return old[1] + offset, new[1] + offset, heads


def _move_sums(
    sums: torch.Tensor,
    old: tuple[torch.Tensor, ...],
    new: tuple[torch.Tensor, ...],
    num_rankings: int,
) -> None:
    if num_rankings == 1:
        sums[:, new[1]] = sums[:, old[1]]
    else:
        sums[new] = sums[old]
