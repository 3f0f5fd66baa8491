"""Moves cache rows inside a request's own blocks, through registers only."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# (moves at a time, bytes of a row at a time, warps): a thread holds at most 128 bytes.
TILES = [(256, 32, 4), (2048, 32, 16), (4096, 16, 16)]
ROWS_AT_A_TIME = TILES[-1][0]
"""Lists up to this length may overlap in any way."""


@triton.jit
def _move_rows(
    cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks_ptr,  # [num_request_blocks]
    source_ptr,  # [num_moves]
    target_ptr,  # [num_moves]
    heads_ptr,  # [num_moves] or None
    num_moves,
    head,
    column,  # [1, columns]
    stride_block,
    stride_head,
    stride_slot,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    rows: tl.constexpr,
):
    cache_ptr += head * stride_head
    for start in range(0, num_moves, rows):
        move = start + tl.arange(0, rows)
        live = move < num_moves
        source = tl.load(source_ptr + move, mask=live, other=-1).to(tl.int64)
        target = tl.load(target_ptr + move, mask=live, other=-1).to(tl.int64)
        live = (source >= 0) & (target >= 0)
        if heads_ptr is not None:
            live &= tl.load(heads_ptr + move, mask=live, other=-1) == head
        old = tl.load(blocks_ptr + source // block_size, mask=live, other=0)
        new = tl.load(blocks_ptr + target // block_size, mask=live, other=0)
        old = old.to(tl.int64) * stride_block + source % block_size * stride_slot
        new = new.to(tl.int64) * stride_block + target % block_size * stride_slot
        moved = live[:, None] & (column < head_size)
        moving = tl.load(cache_ptr + old[:, None] + column, mask=moved)
        # All rows are in registers before the first is written.
        tl.debug_barrier()
        tl.store(cache_ptr + new[:, None] + column, moving, mask=moved)


@triton.jit(
    do_not_specialize=["num_moves"],
    do_not_specialize_on_alignment=["blocks_ptr"],
)
def _compact_blocks_kernel(
    key_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks_ptr,  # [num_request_blocks]
    source_ptr,  # [num_moves]
    target_ptr,  # [num_moves]
    heads_ptr,  # [num_moves] or None
    num_moves,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    # A program owns columns columns of one KV head's keys or values: nobody else
    # reads or writes them.
    column = tl.program_id(0) * columns + tl.arange(0, columns)[None, :]
    head = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        _move_rows(
            key_ptr,
            blocks_ptr,
            source_ptr,
            target_ptr,
            heads_ptr,
            num_moves,
            head,
            column,
            key_stride_block,
            key_stride_head,
            key_stride_slot,
            head_size,
            block_size,
            rows,
        )
    else:
        _move_rows(
            value_ptr,
            blocks_ptr,
            source_ptr,
            target_ptr,
            heads_ptr,
            num_moves,
            head,
            column,
            value_stride_block,
            value_stride_head,
            value_stride_slot,
            head_size,
            block_size,
            rows,
        )


def as_bits(cache: torch.Tensor) -> torch.Tensor:
    """`cache` as integers of its width: what is moved need not be understood."""
    return cache.view(BITS[cache.itemsize])


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """Copy the rows at positions `source` to positions `target`, in place.

    No memory is taken. Up to ROWS_AT_A_TIME moves (of all heads together) overlap as
    they like. A longer list is taken ROWS_AT_A_TIME moves at a time, in its order, and
    the caller sees to it that no part reads, in one head, what an earlier part wrote.
    So it is where no source is a target, and where rows only move up and the list
    begins with the last: sources and targets both descend.

    Bits are moved, so any dtype of 1, 2 or 4 bytes will do.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides
            but the last.
        value_cache: as key_cache.
        blocks: [num_request_blocks] block ids of the request, int32 or int64.
        source: [num_moves] positions in the request, int32 or int64; a move with a
            negative position is padding.
        target: [num_moves] positions in the request, distinct in a head.
        heads: [num_moves] KV head of each move; None moves all heads alike.
    """
    if not len(source):
        return
    lists = source, target, source if heads is None else heads
    assert all(positions.is_contiguous() for positions in lists)
    num_kv_heads, block_size, head_size = key_cache.shape[1:]
    rows, num_bytes, num_warps = next(
        (tile for tile in TILES if len(source) <= tile[0]), TILES[-1]
    )
    columns = num_bytes // key_cache.itemsize
    _compact_blocks_kernel[triton.cdiv(head_size, columns), num_kv_heads, 2](
        as_bits(key_cache),
        as_bits(value_cache),
        blocks,
        source,
        target,
        heads,
        len(source),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        head_size=head_size,
        block_size=block_size,
        rows=rows,
        columns=columns,
        num_warps=num_warps,
    )
