"""Copies cache rows from some blocks of a request to others."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Of the rows that a program copies: four accesses of 16 bytes a thread.
BYTES_AT_A_TIME = 8192


@triton.jit
def _row_offsets(
    blocks_ptr,  # [num_blocks] or None: rows lie one after the other
    slots_ptr,  # [num_rows] or None: row i is slot i
    row,  # [rows]
    exists,  # [rows]
    stride_block,
    stride_slot,
    block_size: tl.constexpr,
):
    slot = row
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row, mask=exists, other=0)
    if blocks_ptr is None:
        offset = slot.to(tl.int64) * stride_slot
    else:
        block = tl.load(blocks_ptr + slot // block_size, mask=exists, other=0)
        offset = block.to(tl.int64) * stride_block + slot % block_size * stride_slot
    return offset


@triton.jit(
    do_not_specialize=["num_rows", "source_stride_ranking", "target_stride_ranking"],
    do_not_specialize_on_alignment=["source_blocks_ptr", "target_blocks_ptr"],
)
def _copy_rows_kernel(
    target_ptr,  # [num_blocks, num_kv_heads, block_size, row_size]
    source_ptr,  # as target
    target_blocks_ptr,  # [num_target_blocks] or None
    source_blocks_ptr,  # [num_source_blocks] or None
    target_slots_ptr,  # [num_rankings, num_rows] or None
    source_slots_ptr,  # [num_rankings, num_rows] or None
    num_rows,
    source_stride_ranking,
    target_stride_ranking,
    target_stride_block,
    target_stride_head,
    target_stride_slot,
    source_stride_block,
    source_stride_head,
    source_stride_slot,
    row_size: tl.constexpr,
    block_size: tl.constexpr,
    rows: tl.constexpr,
    block_d: tl.constexpr,
):
    # A program owns rows rows of one KV head.
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    head = tl.program_id(1).to(tl.int64)
    exists = row < num_rows
    if target_slots_ptr is not None:
        target_slots_ptr += head * target_stride_ranking
    if source_slots_ptr is not None:
        source_slots_ptr += head * source_stride_ranking
    old = _row_offsets(
        source_blocks_ptr,
        source_slots_ptr,
        row,
        exists,
        source_stride_block,
        source_stride_slot,
        block_size,
    )
    new = _row_offsets(
        target_blocks_ptr,
        target_slots_ptr,
        row,
        exists,
        target_stride_block,
        target_stride_slot,
        block_size,
    )
    column = tl.arange(0, block_d)[None, :]
    copied = exists[:, None] & (column < row_size)
    source_ptr += head * source_stride_head
    target_ptr += head * target_stride_head
    copying = tl.load(source_ptr + old[:, None] + column, mask=copied)
    tl.store(target_ptr + new[:, None] + column, copying, mask=copied)


def copy_rows(
    kv_cache: torch.Tensor,
    source_blocks: torch.Tensor,
    source: torch.Tensor,
    target_blocks: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    in_place: bool = False,
) -> None:
    """Copy rows, keys with their values.

    Bits are copied, so any dtype of 1, 2 or 4 bytes will do.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, row_size], any strides but the
            last.
        source_blocks: [num_source_blocks] block ids, int32 or int64.
        source: [num_rankings, num_rows] int32, slots of the source blocks;
            num_rankings is 1, for all KV heads, or num_kv_heads.
        target_blocks: [num_target_blocks] block ids.
        target: as source, distinct in a head; None for the first slots.
        in_place: whether a row may be written that is read for another one. Then all
            rows are copied to memory of their own first.
    """
    bits = kv_cache.view(BITS[kv_cache.itemsize])
    _, num_kv_heads, _, row_size = kv_cache.shape
    num_rows = source.shape[1]
    to = bits, target_blocks, target
    if in_place:
        scratch = bits.new_empty(1, num_kv_heads, num_rows, row_size)
        _launch((scratch, None, None), (bits, source_blocks, source), kv_cache)
        _launch(to, (scratch, None, None), kv_cache, num_rows)
    else:
        _launch(to, (bits, source_blocks, source), kv_cache)


def _launch(to, of, kv_cache, num_rows=None):
    target_cache, target_blocks, target = to
    source_cache, source_blocks, source = of
    assert all(slots is None or slots.is_contiguous() for slots in (source, target))
    _, num_kv_heads, block_size, row_size = kv_cache.shape
    num_rows = source.shape[1] if num_rows is None else num_rows
    block_d = triton.next_power_of_2(row_size)
    rows = max(BYTES_AT_A_TIME // (block_d * kv_cache.itemsize), 1)
    _copy_rows_kernel[triton.cdiv(num_rows, rows), num_kv_heads](
        target_cache,
        source_cache,
        target_blocks,
        source_blocks,
        target,
        source,
        num_rows,
        _ranking_stride(source),
        _ranking_stride(target),
        *target_cache.stride()[:3],
        *source_cache.stride()[:3],
        row_size=row_size,
        block_size=block_size,
        rows=rows,
        block_d=block_d,
    )


def _ranking_stride(slots):
    """Elements between the slots of two KV heads."""
    return 0 if slots is None or len(slots) == 1 else slots.stride(0)
