"""Core as kernels on CUDA read it: lists of slots, in buffers that graphs know.

A captured CUDA graph holds the launch, so everything that changes from step to step
lies in buffers that are filled before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

NUM_NUMBERS = 5
"""That say what a row reads, see `listed_rows.select`."""


class CoreLists:
    """Lists of core of every layer of a group, and the scratch that layers share."""

    def __init__(
        self,
        num_slots: int,
        num_heads: int,
        num_kv_heads: int,
        num_lists: int,
        max_num_seqs: int,
        num_entered: torch.Tensor,
        layer_names: Sequence[str],
    ) -> None:
        """Allocate, before any graph is captured that would own what it allocates.

        Args:
            num_slots: rows of the cache.
            num_heads: query heads of this rank.
            num_kv_heads: KV heads of this rank.
            num_lists: lists of a layer: 1 for all KV heads, or one for each.
            max_num_seqs: rows of a batch.
            num_entered: [1] int32, where kernels add the rows that enter core.
            layer_names: of the group.
        """
        device = num_entered.device

        def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.num_kv_heads = num_kv_heads
        self.device = device
        self.core_list = {
            name: new(torch.int32, num_lists, num_slots) for name in layer_names
        }
        """By layer name, see `kernels.cuda.selected_attention`."""
        self.row_tokens = {name: new(torch.int32, num_slots) for name in layer_names}
        """By layer name, see `kernels.cuda.select_core`."""
        self.scores = new(torch.float32, num_kv_heads, num_slots)
        self.logits = new(torch.float32, num_heads, num_slots)
        self.num_entered = num_entered
        self.selections = new(torch.int32, NUM_NUMBERS, max_num_seqs)

    def fill(self, selections: npt.NDArray, num_rows: int) -> torch.Tensor:
        """Put what a step's rows read where its launch looks.

        Args:
            selections: [NUM_NUMBERS, at most num_rows], see `listed_rows.select`.
            num_rows: of the launch; those behind the given ones read all.
        """
        host = np.zeros((NUM_NUMBERS, num_rows), np.int32)
        host[:, : selections.shape[1]] = selections
        view = self.selections[:, :num_rows]
        view.copy_(torch.from_numpy(host), non_blocking=True)
        return view
