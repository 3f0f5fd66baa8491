"""One layer's cache as vLLM's CPU kernel lays it out, and the operations on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from vllm_avl.backend.rows import Moves
from vllm_avl.kernels import (
    attention_scores,
    compact_blocks,
    exchange_rows,
    host,
    scored_attention,
)

KEYS_BY_COLUMN = ("vec", "vec16")
"""Instruction sets of vLLM's kernel whose keys lie `[head_size, block_size]`."""


@dataclass(frozen=True)
class CPUCache:
    """A layer's cache on this rank."""

    kv_cache: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, 2 · head_size], a block's keys by column,
    then its values by row."""
    head_size: int
    scale: float
    soft_cap: float
    paid: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """By index of a row's token in the step, [num_heads, num_slots] attention."""

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
        """Return False: what is counted here is known at once."""
        return False

    @cached_property
    def halves(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, 2, block_size · head_size]: keys, values."""
        num_blocks, num_kv_heads, block_size, _ = self.kv_cache.shape
        return self.kv_cache.view(
            num_blocks, num_kv_heads, 2, block_size * self.head_size
        )

    @cached_property
    def keys(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        columns = self.halves[:, :, 0].unflatten(-1, (self.head_size, self.block_size))
        return columns.transpose(-1, -2)

    @cached_property
    def values(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.halves[:, :, 1].unflatten(-1, (self.block_size, self.head_size))

    def scores(
        self, query: torch.Tensor, blocks: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """As `kernels.attention_scores`."""
        return attention_scores(
            query, self.keys, blocks, num_tokens, self.scale, self.soft_cap
        )

    def attend(
        self, query: torch.Tensor, blocks: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `kernels.scored_attention`."""
        rest = blocks, num_tokens, self.scale, self.soft_cap
        if self.kv_cache.dtype not in host.DTYPES:
            return scored_attention(query, self.keys, self.values, *rest)
        row = host.Row(blocks, num_tokens)
        read = self.select(query.unsqueeze(0), [row])
        return read.output[0], read.probabilities(0, row)

    def select(self, query: torch.Tensor, rows: Sequence[host.Row]) -> host.Attention:
        """As `kernels.host.selected_attention`."""
        return host.selected_attention(
            query, self.halves, rows, self.scale, self.soft_cap
        )

    def probabilities(
        self, token: int, _blocks: torch.Tensor, _num_slots: int
    ) -> torch.Tensor:
        """[num_heads, num_slots] attention that a row of the step paid."""
        return self.paid[token]

    def list_core(self, *_: object) -> None:
        """Do nothing: the rows' own mask is the list (`LayerRows.listed`)."""

    def move(self, blocks: torch.Tensor, moves: Moves) -> None:
        """Move rows of a request whose block ids are `blocks`."""
        pairs = blocks, moves.source, moves.target
        if not moves.exchange:
            compact_blocks(self.keys, self.values, *pairs, moves.heads)
        elif moves.heads is None and self.kv_cache.dtype in host.DTYPES:
            host.exchange_rows(self.halves, *pairs, self.head_size)
        else:
            exchange_rows(self.keys, self.values, *pairs, moves.heads)
