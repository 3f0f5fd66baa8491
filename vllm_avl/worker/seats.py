"""What a step has to know of every adaptive request, in arrays.

A request has a seat from the end of its prompt until it is finished or preempted. What
its steps read changes when the request changes, which is seldom; a step takes the rows
of all seats at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

NEVER = np.iinfo(np.int64).max
SEAT = np.dtype(
    [
        ("num_prompt", np.int64),
        # Blocks in front of the stored ones: the runner's table still names them.
        ("first_block", np.int64),
        # Blocks of the request's own that stand behind those.
        ("num_private", np.int64),
        # Steps between two that read all that is stored; 0: every step does.
        ("interval", np.int64),
        # Whether those are scored.
        ("is_scored", np.bool_),
        # Whether the others read core.
        ("has_core", np.bool_),
        # Whether kept rows lie in a prompt's blocks, so that all steps read a mask.
        ("shares", np.bool_),
        # First stored slots of which some are not core; all behind them are read.
        ("num_masked", np.int64),
        # Of those, how many ordinary steps read.
        ("num_listed", np.int64),
        # Bytes between the masks of two KV heads; 0 where all heads have the same.
        ("mask_stride", np.int64),
        # Whether kernels of the pass itself choose core.
        ("in_pass", np.bool_),
        # Whether a full CUDA graph can read what its ordinary steps read.
        ("in_graph", np.bool_),
        # Ranked rows that a selection takes into core.
        ("num_selected", np.int64),
        # Length at which text leaves its window next.
        ("next_aging", np.int64),
        ("num_tokens", np.int64),
        # Length with the last step's first token, if drafts followed it; else 0.
        ("num_certain", np.int64),
        ("num_refreshes", np.int64),
    ]
)

Seats = npt.NDArray[np.int64]
"""Seats of some requests."""


class SeatTable:
    """All seats of a worker."""

    def __init__(self, device: str | torch.device = "cpu", capacity: int = 8) -> None:
        self.records = np.zeros(capacity, SEAT)
        """[num_seats] of SEAT."""
        self.private = torch.zeros(capacity, 8, dtype=torch.int32, device=device)
        """[num_seats, max_private] block ids, as the block manager counts them."""
        self._masks: dict[str, npt.NDArray[np.int64]] = {}
        """By layer's name, [num_seats, 2]: of core, and of what stays."""
        self._free = list(range(capacity))[::-1]

    def take(self) -> int:
        """Return a seat that nobody has."""
        if not self._free:
            taken = len(self.records)
            self.records = np.concatenate([self.records, np.zeros(taken, SEAT)])
            self.private = torch.cat([self.private, torch.zeros_like(self.private)])
            for layer, masks in self._masks.items():
                self._masks[layer] = np.concatenate([masks, np.zeros_like(masks)])
            self._free = list(range(taken, 2 * taken))[::-1]
        seat = self._free.pop()
        self.records[seat] = np.zeros((), SEAT)
        return seat

    def free(self, seat: int) -> None:
        """Let somebody else have a seat."""
        self._free.append(seat)

    def set_private(self, seat: int, block_ids: Sequence[int]) -> None:
        """Say which blocks of its own a request has, in the order of its slots."""
        size = len(block_ids)
        if size > self.private.shape[1]:
            wider = self.private.new_zeros(len(self.private), 2 * size)
            wider[:, : self.private.shape[1]] = self.private
            self.private = wider
        ids = torch.tensor(block_ids, dtype=torch.int32)
        self.private[seat, :size] = ids.to(self.private.device, non_blocking=True)
        self.records["num_private"][seat] = size

    def set_mask(
        self, layer: str, seat: int, address: int, *, of_kept: bool = False
    ) -> None:
        """Say where a layer's mask over a request's slots lies in memory.

        Args:
            layer: name of it.
            seat: of the request.
            address: of the mask.
            of_kept: whether it says what stays, and not what is core.
        """
        self._masks_of(layer)[seat, int(of_kept)] = address

    def masks(
        self, layer: str, seats: Seats, of_kept: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.int64]:
        """Addresses of a layer's masks; 0 where none has been set.

        Args:
            layer: name of it.
            seats: of the requests.
            of_kept: as seats, 1 for the mask of what stays, 0 for that of core.
        """
        return self._masks_of(layer)[seats, of_kept]

    def _masks_of(self, layer: str) -> npt.NDArray[np.int64]:
        if layer not in self._masks:
            self._masks[layer] = np.zeros((len(self.records), 2), np.int64)
        return self._masks[layer]
