"""Which prompt tokens were core after each selection, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

MAX_RANKINGS = 64
"""Of all selections of a layer: with a ranking for each KV head they are fewer."""
PACKED_AT_ONCE = 8
"""Rankings. Between two layers of a model the processor's caches forget what packs
them: one by one it would take several times as long."""


@dataclass
class CoreHistory:
    """One layer's selections, a bit a token; thinned out where they become many."""

    _selections: list[tuple[int, npt.NDArray[np.uint8]]] = field(default_factory=list)
    """Length of the request, and [num_rankings, cdiv(num_full_tokens, 8)] bits."""
    _noted: list[tuple[int, torch.Tensor, torch.Tensor, int]] = field(
        default_factory=list
    )
    """What `note` was told since bits were made of it."""

    def note(
        self,
        num_tokens: int,
        positions: torch.Tensor,
        core: torch.Tensor,
        num_full_tokens: int,
    ) -> None:
        """Remember one selection; its tensors must not change any more.

        Args:
            num_tokens: length of the request after the step.
            positions: [num_rankings, num_slots] original positions of stored rows.
            core: [num_rankings, num_slots], True where ordinary steps read them.
            num_full_tokens: tokens of the full prompt blocks; others are not ranked.
        """
        limit = max(MAX_RANKINGS // len(positions), 2)
        if len(self._selections) + len(self._noted) >= limit:
            self._pack()
            del self._selections[1::2]
        self._noted.append((num_tokens, positions, core, num_full_tokens))
        if len(self._noted) * len(positions) >= PACKED_AT_ONCE:
            self._pack()

    def _pack(self) -> None:
        self._selections += [
            (num_tokens, _bits(positions, core, num_full_tokens))
            for num_tokens, positions, core, num_full_tokens in self._noted
        ]
        self._noted.clear()

    def among(self, positions: torch.Tensor) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield each selection's length, and which of `positions` it read, by ranking.

        Args:
            positions: [num_positions] of full prompt blocks, ascending, int64.
        """
        self._pack()
        wanted = positions.cpu().numpy()
        for num_tokens, bits in self._selections:
            read = np.unpackbits(bits, axis=1)[:, wanted] != 0
            yield num_tokens, [wanted[row].tolist() for row in read]


def _bits(
    positions: torch.Tensor, core: torch.Tensor, num_full_tokens: int
) -> npt.NDArray[np.uint8]:
    # NumPy, because a call of torch costs more than its work on so little data.
    rows = np.minimum(positions.cpu().numpy(), num_full_tokens)
    read = np.zeros((len(rows), num_full_tokens + 1), np.bool_)
    np.put_along_axis(read, rows, core.cpu().numpy(), axis=1)
    return np.packbits(read[:, :num_full_tokens], axis=1)
