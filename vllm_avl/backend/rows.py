"""Which token lies in which stored slot, and how rows are put in order.

A request's stored slots are two regions: secondary, then core with the text. Order
inside a region carries no meaning, because the rotary position is inside the cached
key; so a rearrangement moves only rows that are in the wrong region. Its moves are
pairs without a slot in common, so they can be done in place and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from vllm_avl.backend.history import CoreHistory

EVICTED, SECONDARY, CORE = 0, 1, 2
"""Labels of rows. CORE also means what is always read: text, the partial block."""


@dataclass
class LayerRows:
    """The rows one layer stores of one request; a column is a slot."""

    start: int
    """Position in the request's block table, in tokens, of the first slot."""
    positions: torch.Tensor
    """[num_rankings, num_slots] original position of each row, int64; num_rankings is 1
    until KV heads differ, then num_kv_heads. Replaced, never changed."""
    sums: torch.Tensor | None = None
    """[num_kv_heads, num_slots] running sums of attention, fp32; NaN where a row has
    not been scored yet. None where nobody needs them."""

    listed: torch.Tensor | None = None
    """[num_full_slots], True where a row of the full prompt blocks is in core's list;
    None where core has blocks of its own."""
    history: CoreHistory = field(default_factory=CoreHistory)
    """Earlier selections, where they are remembered."""

    @property
    def end(self) -> int:
        """Length of the request, in tokens."""
        return self.start + self.positions.shape[1]

    def extend(self, num_tokens: int) -> None:
        """Take the rows that decode steps have appended, up to `num_tokens`."""
        if num_tokens == self.end:
            return
        # An appended row lies at its own position.
        device = self.positions.device
        new = torch.arange(self.end, num_tokens, device=device)
        new = new.expand(len(self.positions), -1)
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


@dataclass(frozen=True)
class KernelRows:
    """Where kernels keep which tokens one layer stores of one request."""

    start: int
    """As `LayerRows.start`."""
    blocks: torch.Tensor
    """[num_stored_blocks] block ids from `start` to the last full block, int64."""
    row_tokens: torch.Tensor
    """[num_blocks · block_size] int32, see `kernels.gpu.select_prompt`."""
    block_size: int

    def read(self) -> LayerRows:
        """Look up positions and core; waits for the device."""
        by_block = self.row_tokens.unflatten(0, (-1, self.block_size))
        tokens = by_block[self.blocks].flatten().to("cpu", torch.int64)
        positions = torch.where(tokens < 0, ~tokens, tokens >> 1)
        listed = (tokens < 0) | (tokens & 1 == 1)
        return LayerRows(self.start, positions.unsqueeze(0), listed=listed)


@dataclass(frozen=True)
class Moves:
    """Rows that change slots, in pairs of slots; no slot is named twice in a head."""

    source: torch.Tensor
    """[num_pairs] slots in tokens of the request, int64; -1 is padding."""
    target: torch.Tensor
    """As source."""
    heads: torch.Tensor | None
    """[num_pairs] KV head of each pair, int64; None where all heads move alike."""
    exchange: bool
    """Whether the row at the target goes to the source; else it is lost."""


def rearrange(
    rows: LayerRows,
    labels: torch.Tensor,
    start: int,
    core_start: int,
    *,
    padded: bool = False,
) -> list[Moves]:
    """Find the moves after which the regions hold what their rows are labelled.

    `rows` is updated to the state after the moves.

    Args:
        rows: the layer's rows.
        labels: [num_rankings, num_slots]; in every ranking, SECONDARY fits the slots
            [start, core_start) and CORE those behind.
        start: first slot, in tokens of the request, that stays stored.
        core_start: first slot of core.
        padded: give as many pairs as there could be, so that nobody has to wait for a
            device that counts them.

    Returns:
        what to move, one after the other.
    """
    num_head, num_secondary = start - rows.start, core_start - start
    num_core = rows.end - core_start
    # One slot more, which padding is exchanged with.
    labels = _spare(labels, -1)
    _spare_rows(rows)
    slots = torch.arange(labels.shape[1], device=labels.device) + rows.start
    head = slots < start, num_head
    in_core = slots >= core_start, num_core
    in_secondary = (slots >= start) & (slots < core_start), num_secondary
    steps = []
    if num_secondary:
        steps += [(CORE, in_secondary, SECONDARY, in_core)]
        if num_head:
            steps += [
                (CORE, in_secondary, EVICTED, in_core),
                (SECONDARY, in_core, EVICTED, in_secondary),
                (SECONDARY, head, EVICTED, in_secondary),
            ]
    if num_head:
        # Blocks of the head may be shared: rows are read there, and never written.
        steps += [(CORE, head, EVICTED, in_core)]
    found = []
    for label, (here, size), other_label, (there, other_size) in steps:
        source, target = _pair(
            (labels == label) & here,
            (labels == other_label) & there,
            min(size, other_size) if padded else None,
        )
        if len(source):
            exchange = other_label != EVICTED
            found.append(_moves(rows, source, target, exchange=exchange))
            _exchange(labels, source, target)
            _exchange_rows(rows, source, target)
    # Copies, so that what lay in front is given back.
    rows.start, rows.positions = start, rows.positions[:, num_head:-1].clone()
    if rows.sums is not None:
        rows.sums = rows.sums[:, num_head:-1].clone()
    return found


def _spare(values: torch.Tensor, value: float = 0) -> torch.Tensor:
    """Copy `values` with one column more, of `value`."""
    return functional.pad(values, (0, 1), value=value)


def _spare_rows(rows: LayerRows) -> None:
    rows.positions = _spare(rows.positions)
    if rows.sums is not None:
        rows.sums = _spare(rows.sums)


def _pair(
    sources: torch.Tensor, targets: torch.Tensor, most: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair True elements of each ranking while both masks have some.

    Returns:
        two [num_pairs, 2] indices of ranking and slot; of `most` pairs a ranking, -1
        behind the last, if that is given.
    """
    num_pairs = torch.minimum(sources.sum(1), targets.sum(1)).unsqueeze(1)
    paired = [mask & (mask.cumsum(1) <= num_pairs) for mask in (sources, targets)]
    if most is None:
        source, target = (mask.nonzero() for mask in paired)
    else:
        size = most * len(sources)
        source, target = (torch.nonzero_static(mask, size=size) for mask in paired)
    return source, target


def _moves(
    rows: LayerRows, source: torch.Tensor, target: torch.Tensor, *, exchange: bool
) -> Moves:
    def slots(index: torch.Tensor) -> torch.Tensor:
        return torch.where(index[:, 1] < 0, -1, index[:, 1] + rows.start)

    # Kernels read them one after the other.
    heads = source[:, 0].contiguous() if len(rows.positions) > 1 else None
    return Moves(slots(source), slots(target), heads, exchange)


def _exchange_rows(rows: LayerRows, one: torch.Tensor, other: torch.Tensor) -> None:
    _exchange(rows.positions, one, other)
    if rows.sums is not None:
        _exchange(rows.sums, one, other, every_row=len(rows.positions) == 1)


def _exchange(
    values: torch.Tensor,
    one: torch.Tensor,
    other: torch.Tensor,
    *,
    every_row: bool = False,
) -> None:
    """Exchange elements at `[num_pairs, 2]` indices of row and column.

    Padding names the last column of the last row, which nobody else does.
    """
    a, b = one.unbind(1), other.unbind(1)
    if every_row:
        a, b = (slice(None), a[1]), (slice(None), b[1])
    values[a], values[b] = values[b], values[a]
