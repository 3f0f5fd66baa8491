"""A paged KV cache as vLLM lays it out, and the requests of a batch that read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def name(self) -> str:
        """Query heads x head size, over KV heads."""
        kind = "MHA" if self.num_heads == self.num_kv_heads else "GQA"
        return f"{kind} {self.num_heads}/{self.num_kv_heads}x{self.head_size}"

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.head_size**-0.5


SHAPES = {"mha": Heads(32, 32, 128), "gqa": Heads(28, 4, 128)}
"""LLaVA-1.5-7B's and Qwen2.5-VL-7B's."""
TINY = {"mha": Heads(2, 2, 64), "gqa": Heads(3, 1, 64)}
"""For the interpreter."""


@dataclass(frozen=True)
class Reads:
    """What every request reads: listed slots, then the slots from `first_slot` on."""

    name: str
    seq_len: int
    first_slot: int = 0
    num_core: int = 0
    scored: bool = False

    @property
    def num_rows(self) -> int:
        """Cache rows of one request and KV head."""
        return self.num_core + self.seq_len - self.first_slot


@dataclass(frozen=True)
class Pool:
    """One layer's cache, and the blocks of some copies of a batch in it.

    Attributes:
        cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], in memory slots
            before heads.
        tables: [num_copies, batch, blocks of a request] int32, shuffled; 0 is nobody's.
        seq_len: of every request.
    """

    cache: torch.Tensor
    tables: torch.Tensor
    seq_len: int

    @classmethod
    def random(
        cls,
        heads: Heads,
        block_size: int,
        seq_len: int,
        copies_of_batch: tuple[int, int],
        like: torch.Tensor,
    ) -> Pool:
        """Return a cache of random rows, on the device and in the dtype of `like`."""
        blocks = math.ceil(seq_len / block_size)
        num_blocks = 1 + math.prod(copies_of_batch) * blocks
        shape = num_blocks, block_size, heads.num_kv_heads, 2 * heads.head_size
        order = torch.randperm(num_blocks - 1, device=like.device) + 1
        return cls(
            like.new_empty(shape).normal_().transpose(1, 2),
            order.view(*copies_of_batch, blocks).int(),
            seq_len,
        )

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return self.cache.shape[2]

    @property
    def num_rows(self) -> int:
        """Rows of all blocks."""
        return self.cache.shape[0] * self.block_size

    @cached_property
    def keys(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.cache[..., : self.cache.shape[3] // 2]

    @cached_property
    def values(self) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_size] view."""
        return self.cache[..., self.cache.shape[3] // 2 :]

    @cached_property
    def rows(self) -> torch.Tensor:
        """[num_rows, num_kv_heads, 2 * head_size] view: all slots of all blocks."""
        return self.cache.transpose(1, 2).flatten(0, 1)

    def rows_of(self, tables: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return the cache rows of [..., batch, n] slots, int64."""
        slots = slots.long().expand(*tables.shape[:-1], -1)
        blocks = tables.long().gather(-1, slots // self.block_size)
        return blocks * self.block_size + slots % self.block_size

    def last(self, seq_len: int) -> Pool:
        """Return the pool of requests that store their last slots alone.

        Raises:
            ValueError: what is stored does not begin with a block.
        """
        num_blocks, rest = divmod(self.seq_len - seq_len, self.block_size)
        if rest:
            raise ValueError(f"the last {seq_len} slots do not begin with a block")
        tables = self.tables[..., num_blocks:].contiguous()
        return replace(self, tables=tables, seq_len=seq_len)

    def list_core(self, reads: Reads) -> torch.Tensor:
        """Return a core list: slots in front of the tail, in no order."""
        device, shape = self.tables.device, (*self.tables.shape[:2], reads.first_slot)
        core = torch.rand(shape, device=device).argsort()[..., : reads.num_core]
        entries = torch.arange(reads.num_core, device=device)
        core_list = torch.zeros(1, self.num_rows, dtype=torch.int32, device=device)
        core_list[0, self.rows_of(self.tables, entries)] = core.int()
        return core_list

    def rows_read(
        self, reads: Reads, core_list: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """Return [batch, num_rows] cache rows that one copy of the batch reads."""
        device = table.device
        entries = torch.arange(reads.num_core, device=device)
        core = core_list[0, self.rows_of(table, entries)]
        tail = torch.arange(reads.first_slot, self.seq_len, device=device)
        slots = torch.cat([core, tail.expand(len(table), -1)], 1)
        return self.rows_of(table, slots)
