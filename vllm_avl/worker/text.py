"""Evicts text that has aged: whole blocks' worth of rows, each KV head for itself.

Survivors of the first stored blocks fill the holes that evicted rows leave behind them,
and those blocks are free.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_avl.plan import TextWindow
from vllm_avl.worker.rows import LayerRows


class Moves(NamedTuple):
    """Rows that change slots; a row that moves onto itself is padding."""

    source: torch.Tensor
    """[num_kv_heads, num_moves] slots, int32."""
    target: torch.Tensor
    """As source."""


def find_aged(
    rows: LayerRows,
    is_text: torch.Tensor,
    window: TextWindow,
    num_text: int,
    num_evicted: int,
) -> torch.Tensor:
    """Mark the rows that leave the text window.

    Recent tokens never leave. Tokens that have not been scored yet leave after all
    that have been, the oldest first.

    Args:
        rows: the layer's rows, with sums.
        is_text: [num_kv_heads, num_slots], True where a row counts as text.
        window: of the request's plan.
        num_text: text tokens of the sequence, evicted or not.
        num_evicted: rows to mark, for each KV head.

    Returns:
        [num_kv_heads, num_slots] bool.
    """
    assert rows.sums is not None
    positions = torch.where(is_text, rows.positions, -1)
    newest_first = torch.sort(positions, dim=1, descending=True, stable=True).indices
    sums = rows.sums
    # Behind every sum, in doubles that tell neighbouring positions apart.
    priority = torch.where(sums.isnan(), 1e12 + rows.positions.double(), sums.double())
    priority = priority.masked_fill(~is_text, torch.inf)
    num_recent = window.num_recent(num_text)
    priority.scatter_(1, newest_first[:, :num_recent], torch.inf)
    # Of equal sums the lower position stays: look at the newest first.
    order = torch.sort(priority.gather(1, newest_first), dim=1, stable=True).indices
    leaving = newest_first.gather(1, order[:, :num_evicted])
    return torch.zeros_like(is_text).scatter_(1, leaving, True)


def close_ranks(rows: LayerRows, leaving: torch.Tensor, num_freed: int) -> Moves:
    """Let `rows` lose those that leave, and the first slots with them.

    Args:
        rows: the layer's rows, one ranking a KV head; updated to after the moves.
        leaving: [num_kv_heads, num_slots], in each head `num_freed` of them True.
        num_freed: first slots that nobody reads any more.

    Returns:
        what to move, in slots from before.
    """
    survives, holes = ~leaving[:, :num_freed], leaving.clone()
    holes[:, :num_freed] = False
    # As many survive in front as holes are behind; nobody waits for that number.
    num_moves = survives.sum(1, keepdim=True)
    moves = torch.arange(num_freed, device=leaving.device) < num_moves
    source, target = (
        torch.where(moves, _first_true(mask)[:, :num_freed], 0)
        for mask in (survives, holes)
    )
    rows.positions = _moved(rows.positions, source, target, num_freed)
    if rows.sums is not None:
        rows.sums = _moved(rows.sums, source, target, num_freed)
    rows.start += num_freed
    return Moves(source.to(torch.int32), target.to(torch.int32))


def move_mask(mask: torch.Tensor, moves: Moves, num_freed: int) -> torch.Tensor:
    """Return the mask of core that `mask` becomes by `close_ranks`.

    Args:
        mask: [num_kv_heads, num_slots] bool.
        moves: its moves.
        num_freed: as there.
    """
    source, target = (slots.to(torch.int64) for slots in moves)
    return _moved(mask, source, target, num_freed)


def _first_true(mask: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_columns] columns of each row, those of True elements first."""
    return torch.sort(mask, dim=1, descending=True, stable=True).indices


def _moved(
    values: torch.Tensor, source: torch.Tensor, target: torch.Tensor, num_freed: int
) -> torch.Tensor:
    moved = values.scatter(1, target, values.gather(1, source))
    return moved[:, num_freed:].clone()
