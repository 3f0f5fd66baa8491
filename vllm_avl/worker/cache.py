"""What a layer asks of its cache, wherever the cache lies."""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_avl.worker.request import Task
from vllm_avl.worker.rows import LayerRows


class Cache(Protocol):
    """One layer's cache on this rank, in whatever layout, and operations on it."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""

    def score(
        self,
        query: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[num_heads, num_tokens] attention of a sequence's last rows, summed, fp32.

        Args:
            query: [num_rows, num_heads, head_size].
            blocks: block ids of the sequence, int32.
            num_tokens: keys of the sequence.
            output: as query, what the rows attend to, if the step's attention has left
                that to us; None where it never does.
        """

    def seen(self, task: Task, num_slots: int) -> torch.Tensor:
        """[num_heads or num_kv_heads, num_slots] attention of a row, fp32.

        Args:
            task: whose row our kernel has attended in this step.
            num_slots: first slots to look at.
        """

    def rows(
        self, blocks: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [num_kv_heads, num_slots, head_size] each, fp32.

        Args:
            blocks: block ids of a sequence, int32.
            slots: [num_slots] of these blocks, int64.
        """

    def rank(
        self,
        scores: torch.Tensor,
        core_scores: torch.Tensor,
        num_stored: int,
        num_core: int,
        candidates: torch.Tensor,
        fixed: torch.Tensor,
    ) -> torch.Tensor:
        """[num_rankings, num_fixed + num_stored] int32 positions: fixed, core, others.

        Args:
            scores: [num_rankings, num_candidates] fp32, which of them stay.
            core_scores: as scores, which of those are core.
            num_stored: how many stay.
            num_core: how many of those are core.
            candidates: [num_candidates] positions, ascending, int64.
            fixed: [num_fixed] positions that stay in any case, int64.
        """

    def best(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor,
        competes: torch.Tensor,
        num_others: int,
    ) -> torch.Tensor:
        """[num_rankings, num_slots] bool: all but the worst of those that compete.

        Args:
            scores: [num_rankings, num_slots] fp32.
            positions: as scores, int64; of equals the highest is the worst.
            competes: as scores, bool.
            num_others: slots of each ranking that are the worst.
        """

    def copy(
        self,
        source_blocks: torch.Tensor,
        source: torch.Tensor,
        target_blocks: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        """Copy rows.

        Args:
            source_blocks: block ids, int32.
            source: [1 or num_kv_heads, num_rows] int32 slots of those blocks.
            target_blocks: as source_blocks.
            target: as source; None for the first slots.
            in_place: whether a row may be written that is read for another one.
        """

    def set_core(
        self, task: Task, layer: str, rows: LayerRows, mask: torch.Tensor
    ) -> None:
        """Let ordinary steps read core from now on.

        Args:
            task: of the request.
            layer: name of the layer.
            rows: what it stores; its `core` is set.
            mask: [num_rankings, num_slots] bool, contiguous; never changed.
        """
