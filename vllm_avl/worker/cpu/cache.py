"""One layer's cache as vLLM's CPU kernel lays it out, and the operations on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch

from vllm_avl.kernels.cpu.attention import DecodeRows, selected_attention
from vllm_avl.kernels.cpu.copy_rows import copy_rows
from vllm_avl.kernels.cpu.pairs import PAIRS
from vllm_avl.kernels.cpu.rank_rows import rank_rows
from vllm_avl.kernels.cpu.read_rows import read_rows
from vllm_avl.kernels.cpu.scores import attention_scores
from vllm_avl.worker.request import Task
from vllm_avl.worker.rows import LayerRows, Mask
from vllm_avl.worker.selection import best_slots_on_cpu

PACKED = "amx"
"""The one of vLLM's kernels whose rows are in pairs (`kernels/cpu/packed.py`)."""
READABLE = ("vec", "vec16", PACKED) if PAIRS else ("vec", "vec16")
"""Those whose rows ours read on this processor."""


@dataclass(frozen=True)
class CPUCache:
    """A layer's cache on this rank."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, 2 · head_size], as `kernels.cpu` says."""
    head_size: int
    scale: float
    soft_cap: float
    k_scale: float = 1.0
    """What cached keys are multiplied by."""
    v_scale: float = 1.0
    packed: bool = False
    seen_by: dict[int, torch.Tensor] = field(default_factory=dict)
    """By index of a row's token in the step, [num_heads, num_slots] attention."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.kv_cache.shape[1]

    @cached_property
    def halves(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, 2, block_size · head_size]: keys, values."""
        return self.kv_cache.view(*self.kv_cache.shape[:2], 2, -1)

    @property
    def _numbers(self) -> tuple[float, float]:
        return self.scale, self.soft_cap

    @property
    def _form(self) -> dict[str, Any]:
        return {
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "packed": self.packed,
        }

    def attend(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        masks: npt.NDArray,
        output: torch.Tensor,
    ) -> None:
        """As `kernels.cpu.selected_attention`; what scored rows have seen is kept."""
        read = self.halves, rows, masks
        seen = selected_attention(query, *read, output, *self._numbers, **self._form)
        self.seen_by.update({int(rows.tokens[row]): kept for row, kept in seen.items()})

    def score(
        self,
        query: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `kernels.cpu.attention_scores`."""
        read = self.halves, blocks, num_tokens
        return attention_scores(query, *read, *self._numbers, output, **self._form)

    def seen(self, task: Task, num_slots: int) -> torch.Tensor:
        """[num_heads, num_slots] attention of a row that our kernel has attended."""
        return self.seen_by[task.last][:, :num_slots]

    def rows(
        self, blocks: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_kv_heads, num_slots, head_size] keys and values, fp32."""
        keys, values = read_rows(
            self.halves, self.head_size, blocks, slots, packed=self.packed
        )
        return keys * self.k_scale, values * self.v_scale

    def rank(
        self,
        scores: torch.Tensor,
        core_scores: torch.Tensor,
        num_stored: int,
        num_core: int,
        candidates: torch.Tensor,
        fixed: torch.Tensor,
    ) -> torch.Tensor:
        """As `kernels.cpu.rank_rows`."""
        counts = num_stored, num_core
        return rank_rows(scores, core_scores, *counts, candidates, fixed)

    def best(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor,
        competes: torch.Tensor,
        num_others: int,
    ) -> torch.Tensor:
        """As `worker.selection.best_slots_on_cpu`."""
        return best_slots_on_cpu(scores, positions, competes, num_others)

    def copy(
        self,
        source_blocks: torch.Tensor,
        source: torch.Tensor,
        target_blocks: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        """As `kernels.cpu.copy_rows`."""
        copy_rows(
            self.halves,
            self.head_size,
            source_blocks,
            source.contiguous(),
            target_blocks,
            target,
            in_place=in_place,
            packed=self.packed,
        )

    def set_core(
        self, task: Task, layer: str, rows: LayerRows, mask: torch.Tensor
    ) -> None:
        """Let the kernel read the mask where it lies."""
        rows.core = Mask(mask)
        task.state.seats.set_mask(layer, task.state.seat, mask.data_ptr())
