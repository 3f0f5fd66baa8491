"""One layer's cache as vLLM's CUDA back ends lay it out, and the operations on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_avl.backend.rows import Moves
from vllm_avl.kernels.gpu.compact_blocks import compact_blocks
from vllm_avl.kernels.gpu.exchange_rows import exchange_rows
from vllm_avl.kernels.gpu.vision_scores import vision_scores


@dataclass(frozen=True)
class TritonCache:
    """A layer's cache on this rank."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, 2 · head_size], keys then values, strides
    as vLLM chose them."""
    head_size: int
    scale: float
    soft_cap: float
    core_list: torch.Tensor | None = None
    """[1, num_blocks · block_size] int32, see `kernels.gpu.selected_attention`; None
    where core is packed."""
    read_scores: torch.Tensor | None = None
    """[num_kv_heads, num_blocks · block_size] fp32, attention that the step paid."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.kv_cache.shape[1]

    @property
    def block_size(self) -> int:
        """Rows a block holds."""
        return self.kv_cache.shape[2]

    @property
    def pads_moves(self) -> bool:
        """Return True: whoever counts them waits for all work before."""
        return True

    @cached_property
    def keys(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.kv_cache[..., : self.head_size]

    @cached_property
    def values(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.kv_cache[..., self.head_size :]

    def scores(
        self, query: torch.Tensor, blocks: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """As `kernels.attention_scores`."""
        return vision_scores(
            query, self.keys, blocks, num_tokens, self.scale, self.soft_cap
        )

    def probabilities(
        self, _token: int, blocks: torch.Tensor, num_slots: int
    ) -> torch.Tensor:
        """[num_kv_heads, num_slots] attention that the step paid to a request."""
        assert self.read_scores is not None
        return self.read_scores[:, self.rows(blocks, num_slots)]

    def list_core(
        self, blocks: torch.Tensor, in_core: torch.Tensor, size: int, start: int
    ) -> None:
        """Put the slots of core where the request's first stored rows lie."""
        assert self.core_list is not None
        slots = torch.nonzero_static(in_core, size=size).flatten() + start
        self.core_list[0, self.rows(blocks, size)] = slots.to(torch.int32)

    def rows(self, blocks: torch.Tensor, num_slots: int) -> torch.Tensor:
        """[num_slots] rows of the cache where the first slots of blocks lie, int64."""
        in_block = torch.arange(self.block_size, device=blocks.device)
        rows = blocks.unsqueeze(1) * self.block_size + in_block
        return rows.flatten()[:num_slots]

    def move(self, blocks: torch.Tensor, moves: Moves) -> None:
        """Move rows of a request whose block ids are `blocks`."""
        pairs = blocks, moves.source, moves.target, moves.heads
        move = exchange_rows if moves.exchange else compact_blocks
        move(self.keys, self.values, *pairs)
