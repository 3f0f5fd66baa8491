"""What decode rows read in a step, and where a call counts and writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm_avl.kernels.cpu.listed_slots import TILES_BYTES
from vllm_avl.kernels.cpu.pairs import LINE, PAIRS
from vllm_avl.kernels.cpu.tiles import PART, PICKED_BYTES


class DecodeRows:
    """What decode rows read in a step, the same in all layers.

    Args:
        tokens: [num_rows] each row's index in query and output, int64.
        block_table: [num_rows, max_blocks] block ids of their sequences, int32.
        num_tokens: [num_rows] keys that each attends, at least 1, int64.
        num_masked: [num_rows] first slots that a mask covers, int64; all slots behind
            them are read, and with 0 all slots.
        mask_stride: [num_rows] bytes between the masks of two KV heads, int64; 0 for
            one mask for all heads.
        scored: [num_rows] bool, whose probabilities are wanted.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_table: torch.Tensor,
        num_tokens: np.ndarray,
        num_masked: np.ndarray,
        mask_stride: np.ndarray,
        scored: np.ndarray,
    ) -> None:
        assert block_table.dtype == torch.int32
        assert block_table.stride(1) == 1
        self.tokens, self.block_table, self.num_tokens = tokens, block_table, num_tokens
        self.num_masked, self.mask_stride, self.scored = num_masked, mask_stride, scored
        num_rows = len(tokens)
        blocks = block_table.data_ptr()
        blocks += 4 * block_table.stride(0) * np.arange(num_rows, dtype=np.int64)
        ends = np.cumsum(-(-num_tokens // PART))
        arrays = tokens, blocks, num_tokens, num_masked, mask_stride, ends
        self._num_parts = int(ends[-1]) if num_rows else 0
        # Loops read these by address.
        self._numbers = np.stack([part.astype(np.int64) for part in arrays])
        first = self._numbers.ctypes.data
        self.addresses = (*(first + 8 * num_rows * n for n in range(len(arrays))),)
        self._scored = scored.nonzero()[0].tolist()
        self._nowhere = np.zeros(num_rows, np.int64)
        self._scratch: dict[tuple[int, ...], Any] = {}

    def scratch(self, num_kv_heads: int, group: int, head_size: int) -> Any:
        """Addresses of what a call counts with and writes to, kept for all layers."""
        threads = torch.get_num_threads()
        key = threads, num_kv_heads, group, head_size
        if key not in self._scratch:
            items = self._num_parts * num_kv_heads
            counts = torch.zeros(len(self.tokens) * num_kv_heads + 1, dtype=torch.int64)
            of_items = torch.empty(items * group * (head_size + 2), dtype=torch.float32)
            of_thread = 4 * (head_size * (group + 1) + group * PART)
            of_thread += PICKED_BYTES + TILES_BYTES + PART + PAIRS * group * LINE
            of_thread = -(-of_thread // 64) * 64
            of_threads = torch.empty(threads * of_thread, dtype=torch.uint8)
            norms = of_items.data_ptr() + 4 * items * group * head_size
            taken = counts.data_ptr()
            numbers = items, taken, taken + 8, norms, of_items.data_ptr()
            addresses = *numbers, of_threads.data_ptr(), of_thread
            self._scratch[key] = addresses, counts, of_items, of_threads
        addresses, counts, _, _ = self._scratch[key]
        counts[0] = 0
        return addresses

    def probabilities(
        self, num_heads: int
    ) -> tuple[np.ndarray, dict[int, torch.Tensor]]:
        """Room for the scored rows' probabilities, and its address for each row."""
        rooms = {
            row: torch.empty(num_heads, int(self.num_tokens[row]), dtype=torch.float32)
            for row in self._scored
        }
        if not rooms:
            return self._nowhere, rooms
        addresses = np.zeros(len(self.tokens), np.int64)
        for row, room in rooms.items():
            addresses[row] = room.data_ptr()
        return addresses, rooms
