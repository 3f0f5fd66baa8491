"""The template around every policy: budgets, protection, top-k, order of equals.

Works in positions of the sequence, ascending, so that of equal scores the lower
position wins whatever slot it lies in.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_avl.worker.rows import LayerRows


class Candidates:
    """The tokens that compete for core in one layer of one request, by position."""

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
        stays = rows.stays()
        self._held = held.scatter_(1, self._index, True if stays is None else stays)

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

    def by_slot(self, scores: torch.Tensor) -> torch.Tensor:
        """Bring scores back into the order of slots.

        Args:
            scores: [1, num_candidates], or [num_rankings, num_candidates].

        Returns:
            [num_rankings, num_slots]; infinite where a slot does not compete.
        """
        dense = scores.new_full((len(scores), self._end + 1), torch.inf)
        dense[:, self.positions] = scores
        return dense.expand(len(self._index), -1).gather(1, self._index)


def best_slots(
    scores: torch.Tensor, positions: torch.Tensor, competes: torch.Tensor, count: int
) -> torch.Tensor:
    """Mark all slots but the `count` worst of those that compete, in each ranking.

    Of equals those at the highest positions are the worst. Waits for no device.

    Args:
        scores: [num_rankings, num_slots] fp32.
        positions: as scores, int64.
        competes: as scores, bool.
        count: slots that are not marked.
    """
    # From the last position on, so that a stable sort puts later equals first.
    last_first = torch.sort(positions, dim=1, descending=True, stable=True).indices
    scores = _numbers(scores).masked_fill(~competes, torch.inf).gather(1, last_first)
    order = torch.sort(scores, dim=1, stable=True).indices[:, :count]
    worst = last_first.gather(1, order)
    return torch.ones_like(competes).scatter_(1, worst, False)


def best_slots_on_cpu(
    scores: torch.Tensor, positions: torch.Tensor, competes: torch.Tensor, count: int
) -> torch.Tensor:
    """As `best_slots`, without sorting."""
    if not count:
        return torch.ones_like(competes)
    # NumPy, because a call of torch costs more than its work on so little data.
    numbers = np.where(competes.numpy(), _numbers(scores).numpy(), np.inf)
    most = np.partition(numbers, count - 1, axis=1)[:, count - 1, None]
    worst, equal = numbers < most, numbers == most
    lacking = count - worst.sum(1)
    for ranking in np.flatnonzero(equal.sum(1) != lacking).tolist():
        slots = np.flatnonzero(equal[ranking])
        order = np.argsort(-positions[ranking].numpy()[slots])
        equal[ranking] = False
        equal[ranking, slots[order[: lacking[ranking]]]] = True
    return torch.from_numpy(~(worst | equal))


def _numbers(scores: torch.Tensor) -> torch.Tensor:
    """Let scores that are no numbers be the lowest, and infinite ones finite.

    A request whose attention overflows must not take another's rows, nor its own
    evicted ones; what is protected goes before what does not compete.
    """
    return scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
