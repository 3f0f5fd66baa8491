"""What kernels do for a request in a layer: score, choose, move, without counting.

The same choices as `Layer` makes for a policy that ranks by attention, in a few
launches that wait for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_avl.backend.gather import LayerLists
from vllm_avl.backend.ranks import Ranks
from vllm_avl.backend.request import Task
from vllm_avl.backend.rows import KernelRows
from vllm_avl.backend.triton_cache import TritonCache
from vllm_avl.kernels.gpu.compact_blocks import compact_blocks
from vllm_avl.kernels.gpu.select_core import select_core
from vllm_avl.kernels.gpu.select_prompt import select_prompt
from vllm_avl.metrics.definitions import Stage


@dataclass(frozen=True)
class KernelLayer:
    """One attention layer and its cache, on this rank."""

    index: int
    cache: TritonCache
    lists: LayerLists | None
    """None where no core is listed."""
    ranks: Ranks

    def perform(self, task: Task, query: torch.Tensor) -> None:
        """Do what `task` asks of this layer.

        Args:
            task: of a request that `ranks_in_kernels`.
            query: [num_tokens, num_heads, head_size] of the step.
        """
        timed = task.state.timed
        if task.compacts:
            with timed(Stage.SCORING):
                attention = self._score_prompt(task, query)
            with timed(Stage.COMPACTION):
                self._compact(task, attention)
        elif task.scores:
            with timed(Stage.REFRESH):
                self._refresh(task, query)

    def _score_prompt(self, task: Task, query: torch.Tensor) -> torch.Tensor:
        """[num_full_tokens] attention from the scoring rows, over all ranks' heads."""
        plan = task.state.plan
        rows = query[task.query_end - plan.num_scoring_rows : task.query_end]
        by_head = self.cache.scores(rows, task.block_ids, plan.num_prompt_tokens)
        reduction = plan.config.head_reduction
        reduce = torch.amax if reduction == "max" else torch.sum
        attention = self.ranks.reduce(reduce(by_head, 0, keepdim=True), reduction)
        return attention[0, : plan.num_full_tokens]

    def _compact(self, task: Task, attention: torch.Tensor) -> None:
        """Evict minor rows of the prompt, and list core."""
        state, plan = task.state, task.state.plan
        lists = self.lists if plan.has_core else None
        start = plan.private_from * plan.block_size
        source, target = select_prompt(
            attention,
            state.competes,
            task.block_ids,
            plan.block_size,
            start,
            plan.num_stored_vision,
            plan.num_core_vision,
            lists and lists.row_tokens,
            lists and lists.core_list[0],
        )
        blocks = task.block_ids
        compact_blocks(self.cache.keys, self.cache.values, blocks, source, target)
        if lists is not None:
            stored = task.blocks[plan.private_from : plan.num_full_blocks]
            state.kernel_rows[self.index] = KernelRows(
                start, stored, lists.row_tokens, plan.block_size
            )

    def _refresh(self, task: Task, query: torch.Tensor) -> None:
        """Choose core by the last row of a replay, or by all ranks' heads."""
        plan, lists = task.state.plan, self.lists
        assert lists is not None
        start, last = task.first_read_token, task.query_end - 1
        stored = task.blocks[start // plan.block_size :]
        num_slots = plan.num_full_tokens - start
        if task.gathers:
            paid = self.cache.probabilities(last, stored, num_slots)
        else:
            end = task.num_tokens - start
            paid = self.cache.scores(query[last : last + 1], stored, end)[:, :num_slots]
        attention = paid.sum(0, keepdim=True)
        if plan.config.refresh_all_ranks:
            attention = self.ranks.reduce(attention, "mean")
        scores = lists.buffers.scores[:1]
        scores[:, self.cache.rows(stored, num_slots)] = attention
        num_core = plan.num_core_blocks * plan.block_size
        select_core(
            scores,
            lists.row_tokens,
            lists.core_list[0],
            lists.buffers.num_entered,
            task.block_ids.unsqueeze(0),
            plan.block_size,
            *(task.block_ids.new_full((1,), n) for n in (start, plan.num_full_tokens)),
            task.block_ids.new_full((1,), num_core),
        )
