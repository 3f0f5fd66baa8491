"""One layer's cache as vLLM's CUDA back ends lay it out, and the operations on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_avl.kernels.cuda.copy_rows import copy_rows
from vllm_avl.kernels.cuda.rank_rows import rank_rows
from vllm_avl.kernels.cuda.vision_scores import vision_scores
from vllm_avl.worker.cuda.core_lists import CoreLists
from vllm_avl.worker.request import RequestState, Task
from vllm_avl.worker.rows import LayerRows, Mask
from vllm_avl.worker.selection import best_slots


@dataclass(frozen=True)
class ListedCore:
    """Core as kernels keep it: at the rows of the pool where a request's slots lie."""

    row_tokens: torch.Tensor
    """[num_rows] int32 of the pool, see `kernels.cuda.select_core`."""
    rows: torch.Tensor
    """[num_slots] the request's, int64."""

    def mask(self) -> torch.Tensor:
        """[1, num_slots] bool."""
        tokens = self.row_tokens[self.rows].unsqueeze(0)
        return (tokens < 0) | (tokens & 1 == 1)


@dataclass(frozen=True)
class Scales:
    """What the numbers of a layer with an fp8 cache are multiplied by, [] fp32 each."""

    query: torch.Tensor
    """Of queries that vLLM has quantised, too."""
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class CUDACache:
    """A layer's cache on this rank."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, 2 · head_size], keys then values, strides
    as vLLM chose them; of the model's dtype or float8_e4m3fn."""
    head_size: int
    scale: float
    soft_cap: float
    layer_name: str = ""
    lists_of: Callable[[RequestState], CoreLists] | None = None
    """Which lists a request's core is in; None where there are none."""
    scales: Scales | None = None
    """None where the cache is of the model's dtype."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.kv_cache.shape[1]

    @property
    def block_size(self) -> int:
        """Rows a block holds."""
        return self.kv_cache.shape[2]

    @cached_property
    def keys(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.kv_cache[..., : self.head_size]

    @cached_property
    def values(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.kv_cache[..., self.head_size :]

    def score(
        self,
        query: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `kernels.cuda.vision_scores`; the step has attended all rows."""
        query, k_scale = self.unquantised(query)
        options = self.scale, self.soft_cap, k_scale
        return vision_scores(query, self.keys, blocks, num_tokens, *options)

    def unquantised(
        self, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a query as kernels take it, and what they multiply logits by.

        vLLM may hand it over in fp8; fp16 holds all of its numbers.
        """
        if self.scales is None:
            return query, None
        if query.dtype.itemsize > 1:
            return query, self.scales.key
        return query.to(torch.float16), self.scales.query * self.scales.key

    def seen(self, task: Task, num_slots: int) -> torch.Tensor:
        """[num_heads or num_kv_heads, num_slots] attention of a row of our kernel's."""
        assert self.lists_of is not None
        lists = self.lists_of(task.state)
        if task.state.plan.config.head_reduction == "max":
            # The kernel has added the heads of a group up: each one's own are needed.
            rows = self._rows(task.stored, task.num_tokens - task.start)
            logits = lists.logits[:, rows] * math.log(2)
            return logits.softmax(1)[:, :num_slots]
        return lists.scores[:, self._rows(task.stored, num_slots)]

    def rows(
        self, blocks: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_kv_heads, num_slots, head_size] keys and values, fp32."""
        block, slot = blocks[slots // self.block_size], slots % self.block_size
        keys, values = (
            half[block, :, slot].transpose(0, 1).float()
            for half in (self.keys, self.values)
        )
        if self.scales is None:
            return keys, values
        return keys * self.scales.key, values * self.scales.value

    def rank(
        self,
        scores: torch.Tensor,
        core_scores: torch.Tensor,
        num_stored: int,
        num_core: int,
        candidates: torch.Tensor,
        fixed: torch.Tensor,
    ) -> torch.Tensor:
        """By `kernels.cuda.rank_rows`."""
        chosen = rank_rows(scores, core_scores, num_stored, num_core)
        positions = candidates[chosen.to(torch.int64)]
        order = torch.cat([fixed.expand(len(chosen), -1), positions], 1)
        return order.to(torch.int32)

    def best(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor,
        competes: torch.Tensor,
        num_others: int,
    ) -> torch.Tensor:
        """As `backend.selection.best_slots`."""
        return best_slots(scores, positions, competes, num_others)

    def copy(
        self,
        source_blocks: torch.Tensor,
        source: torch.Tensor,
        target_blocks: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        """As `kernels.cuda.copy_rows`."""
        blocks = source_blocks, source.contiguous(), target_blocks
        slots = None if target is None else target.contiguous()
        copy_rows(self.kv_cache, *blocks, slots, in_place=in_place)

    def set_core(
        self, task: Task, layer: str, rows: LayerRows, mask: torch.Tensor
    ) -> None:
        """List core where the kernel reads it."""
        assert self.lists_of is not None
        state = task.state
        lists = self.lists_of(state)
        size = mask.shape[1] - state.plan.num_secondary_rows
        first = (rows.start - task.start) // self.block_size
        places = self._rows(task.stored[first:], mask.shape[1])
        # True first, both in order: nobody waits for how many there are.
        slots = torch.sort(mask, dim=1, descending=True, stable=True).indices[:, :size]
        core_list = lists.core_list[self.layer_name]
        core_list[:, places[:size]] = slots.to(torch.int32)
        rows.core = Mask(mask)
        if state.core_in_pass:
            row_tokens = lists.row_tokens[self.layer_name]
            row_tokens[places] = _tokens(state, rows.positions[0], mask[0])
            rows.core = ListedCore(row_tokens, places)

    def _rows(self, blocks: torch.Tensor, num_slots: int) -> torch.Tensor:
        """[num_slots] rows of the cache where the first slots of blocks lie, int64."""
        in_block = torch.arange(self.block_size, device=blocks.device)
        rows = blocks.to(torch.int64).unsqueeze(1) * self.block_size + in_block
        return rows.flatten()[:num_slots]


def _tokens(
    state: RequestState, positions: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """[num_slots] int32 what kernels that choose core know of a slot's token."""
    tokens = torch.where(
        state.competes[positions.clamp(max=state.plan.num_full_tokens)],
        2 * positions + mask,
        ~positions,
    )
    return tokens.to(torch.int32)
