"""Exchanges pairs of cache rows in place: core selection without a spare row."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_avl.kernels.gpu.compact_blocks import as_bits

# Of one row of each pair: two accesses of 16 bytes a thread.
BYTES_AT_A_TIME = 4096


@triton.jit
def _row_offsets(
    blocks_ptr,  # [num_request_blocks]
    slot,  # [pairs]
    head,
    live,  # [pairs]
    stride_block,
    stride_head,
    stride_slot,
    block_size: tl.constexpr,
):
    block = tl.load(blocks_ptr + slot // block_size, mask=live, other=0).to(tl.int64)
    return block * stride_block + head * stride_head + slot % block_size * stride_slot


@triton.jit
def _exchange(cache_ptr, first, second, live):
    one = tl.load(cache_ptr + first, mask=live)
    other = tl.load(cache_ptr + second, mask=live)
    tl.store(cache_ptr + first, other, mask=live)
    tl.store(cache_ptr + second, one, mask=live)


@triton.jit(
    do_not_specialize=["num_pairs"],
    do_not_specialize_on_alignment=["blocks_ptr"],
)
def _exchange_rows_kernel(
    key_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks_ptr,  # [num_request_blocks]
    first_ptr,  # [num_pairs]
    second_ptr,  # [num_pairs]
    heads_ptr,  # [num_pairs] or None
    num_pairs,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    pairs: tl.constexpr,
    block_d: tl.constexpr,
):
    # A program owns pairs pairs, of one KV head or each of its own, keys and values.
    pair = tl.program_id(0) * pairs + tl.arange(0, pairs)
    exists = pair < num_pairs
    first = tl.load(first_ptr + pair, mask=exists, other=-1).to(tl.int64)
    second = tl.load(second_ptr + pair, mask=exists, other=-1).to(tl.int64)
    live = first >= 0
    if heads_ptr is not None:
        head = tl.load(heads_ptr + pair, mask=live, other=0).to(tl.int64)
    else:
        head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, block_d)[None, :]
    moved = live[:, None] & (column < head_size)
    strides = (key_stride_block, key_stride_head, key_stride_slot)
    one = _row_offsets(blocks_ptr, first, head, live, *strides, block_size)
    other = _row_offsets(blocks_ptr, second, head, live, *strides, block_size)
    _exchange(key_ptr, one[:, None] + column, other[:, None] + column, moved)
    strides = (value_stride_block, value_stride_head, value_stride_slot)
    one = _row_offsets(blocks_ptr, first, head, live, *strides, block_size)
    other = _row_offsets(blocks_ptr, second, head, live, *strides, block_size)
    _exchange(value_ptr, one[:, None] + column, other[:, None] + column, moved)


def exchange_rows(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """Exchange the rows at positions `source` with those at `target`, in place.

    Bits are moved, so any dtype of 1, 2 or 4 bytes will do.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides
            but the last.
        value_cache: as key_cache.
        blocks: [num_request_blocks] block ids of the request, int32 or int64.
        source: [num_pairs] positions in the request, int32 or int64; a pair whose
            source is negative is padding.
        target: [num_pairs] other positions; in a head no position occurs twice.
        heads: [num_pairs] KV head of each pair; None exchanges in all heads alike.
    """
    if not len(source):
        return
    lists = source, target, source if heads is None else heads
    assert all(positions.is_contiguous() for positions in lists)
    num_kv_heads, block_size, head_size = key_cache.shape[1:]
    block_d = triton.next_power_of_2(head_size)
    pairs = BYTES_AT_A_TIME // (block_d * key_cache.itemsize)
    grid = (triton.cdiv(len(source), pairs), num_kv_heads if heads is None else 1)
    _exchange_rows_kernel[grid](
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
        pairs=pairs,
        block_d=block_d,
    )
