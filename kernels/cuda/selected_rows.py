"""Which cache rows a request reads: its core, as a list, then all from a slot on."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def request_reads(reads, request, kv_head, tail_end):
    """What one request reads for one KV head."""
    (
        block_table_ptr,  # [num_reqs, max_blocks]
        core_list_ptr,  # [1 or num_kv_heads, num_blocks * block_size]
        table_stride,
        ranking_stride,
        first_slot_ptr,  # [num_reqs]
        num_core_ptr,  # [num_reqs]
    ) = reads
    return (
        tl.load(num_core_ptr + request),
        tl.load(first_slot_ptr + request),
        tail_end,
        block_table_ptr + request * table_stride,
        core_list_ptr + kv_head * ranking_stride,
    )


@triton.jit
def count_tiles(reads, block_n: tl.constexpr):
    """Tiles of what one request reads."""
    num_core, first_slot, tail_end, _, _ = reads
    num_tail = tl.maximum(tail_end - first_slot, 0)
    return tl.cdiv(num_core, block_n) + tl.cdiv(num_tail, block_n)


@triton.jit
def rows_of_tile(tile, reads, block_size: tl.constexpr, block_n: tl.constexpr):
    """Cache rows, slots (-1 in core: every query row sees it), which are read."""
    num_core, first_slot, tail_end, block_table_ptr, core_list_ptr = reads
    core_tiles = tl.cdiv(num_core, block_n)
    in_core = tile < core_tiles
    entry = tile * block_n + tl.arange(0, block_n)
    slot = entry + tl.where(in_core, 0, first_slot - core_tiles * block_n)
    is_entry = entry < num_core
    is_read = tl.where(in_core, entry - num_core, slot - tail_end) < 0
    cache_row = _cache_row(slot, is_read, block_table_ptr, block_size)
    # A list is paged like the cache: this row holds an entry, not yet what is read.
    core_slot = tl.load(core_list_ptr + cache_row, mask=is_entry, other=0)
    core_row = _cache_row(core_slot, is_entry, block_table_ptr, block_size)
    cache_row = tl.where(in_core, core_row, cache_row)
    return cache_row, tl.where(in_core, -1, slot), is_read


@triton.jit
def _cache_row(slot, mask, block_table_ptr, block_size: tl.constexpr):
    block = tl.load(block_table_ptr + slot // block_size, mask=mask, other=0)
    return block * block_size + slot % block_size
