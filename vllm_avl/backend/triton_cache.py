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

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, num_rows] attention that this step paid to cache rows."""
        assert self.read_scores is not None
        return self.read_scores[:, rows]

    def list_core(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Let the list whose entries lie at cache rows `rows` be `slots`."""
        assert self.core_list is not None
        self.core_list[0, rows] = slots.to(torch.int32)

    def move(self, blocks: torch.Tensor, moves: Moves) -> None:
        """Move rows of a request whose block ids are `blocks`."""
        pairs = blocks, moves.source, moves.target, moves.heads
        move = exchange_rows if moves.exchange else compact_blocks
        move(self.keys, self.values, *pairs)
