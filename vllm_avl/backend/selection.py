"""The template around every policy: budgets, protection, top-k, order of equals.

Works in positions of the sequence, ascending, so that of equal scores the lower
position wins whatever slot it lies in.
"""

from __future__ import annotations

import torch

from vllm_avl.backend.rows import CORE, EVICTED, SECONDARY, LayerRows
from vllm_avl.plan import TextWindow


class Candidates:
    """The tokens that compete in one layer of one request, by position."""

    def __init__(self, positions: torch.Tensor, rows: LayerRows, end: int) -> None:
        """Look up which tokens `rows` still hold.

        Args:
            positions: of the tokens, ascending, int64.
            rows: of the layer.
            end: position behind the last of them, which may lie on a device.
        """
        self.positions = positions
        self._end = end
        # Whatever does not compete shares one place behind the last candidate.
        self._index = rows.positions.clamp(max=self._end)
        shape = len(rows.positions), self._end + 1
        held = torch.zeros(shape, dtype=torch.bool, device=positions.device)
        self._held = held.scatter_(1, self._index, True)

    @property
    def num_rankings(self) -> int:
        """1 until KV heads differ, then the number of KV heads."""
        return len(self._index)

    @property
    def held(self) -> torch.Tensor:
        """[num_rankings, num_candidates], True where a row is still stored."""
        return self._held[:, self.positions]

    def by_position(self, values: torch.Tensor) -> torch.Tensor:
        """Bring [num_kv_heads, num_slots] values into the candidates' order."""
        heads = len(values)
        index = self._index.expand(heads, -1)
        dense = values.new_zeros(heads, self._end + 1).scatter_(1, index, values)
        return dense[:, self.positions]

    def label(
        self,
        scores: torch.Tensor | None,
        num_evicted: int,
        core_scores: torch.Tensor | None,
        num_secondary: int,
    ) -> torch.Tensor:
        """Label every row: the worst candidates EVICTED, the next worst SECONDARY.

        Everything else is CORE, and so is what does not compete.

        Args:
            scores: [1, num_candidates], or [num_rankings, num_candidates]; None where
                none goes.
            num_evicted: candidates that go, for each ranking.
            core_scores: as `scores`, for those that stay; None where all are core.
            num_secondary: candidates outside of core, for each ranking.

        Returns:
            [num_rankings, num_slots] labels.
        """
        given = scores if scores is not None else core_scores
        assert given is not None, "nothing to rank"
        held = self.held[: len(given)]
        ranked = torch.full_like(held, CORE, dtype=torch.int64)
        if scores is not None:
            evicted = _worst(scores, held, num_evicted)
            ranked.masked_fill_(evicted, EVICTED)
            held = held & ~evicted
        if core_scores is not None:
            secondary = _worst(core_scores, held, num_secondary)
            ranked.masked_fill_(secondary, SECONDARY)
        dense = ranked.new_full((len(given), self._end + 1), CORE)
        dense[:, self.positions] = ranked
        return dense.expand(len(self._index), -1).gather(1, self._index)


def _worst(scores: torch.Tensor, held: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest of the held in each row; of equals, the last ones.

    Scores that are no numbers are the lowest: a request whose attention overflows
    must not take another's rows, nor its own evicted ones.
    """
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=lowest).masked_fill(~held, torch.inf)
    # From the last position on, so that a stable sort puts later equals first.
    order = torch.sort(scores.flip(1), dim=1, stable=True).indices[:, :count]
    last = scores.shape[1] - 1
    return torch.zeros_like(held).scatter_(1, last - order, True)


def label_aged_text(
    rows: LayerRows,
    labels: torch.Tensor,
    is_text: torch.Tensor,
    window: TextWindow,
    num_text: int,
    num_evicted: int,
) -> torch.Tensor:
    """Label the rows that leave the text window EVICTED, for every KV head.

    Recent tokens never leave. Tokens that have not been scored yet leave after all
    that have been, the oldest first.

    Args:
        rows: the layer's rows, with sums.
        labels: [num_kv_heads, num_slots] labels before.
        is_text: [num_kv_heads, num_slots], True where a row counts as text.
        window: of the request's plan.
        num_text: text tokens of the sequence, evicted or not.
        num_evicted: rows to label, for each KV head.
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
    return labels.scatter(1, leaving, EVICTED)
