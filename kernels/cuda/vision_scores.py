"""Scores cached tokens on a GPU by the attention the last rows of a sequence pay them.

The map of all rows over all keys is never in memory: a first pass leaves every row's
maximum and sum, split by split; a second makes the probabilities again, a tile of keys
at a time, and adds them over the rows.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

KEYS_PER_SPLIT = 256
MAX_SPLITS = 32
# A finite start of the running maximum: rows that see no key of a split give no NaN.
LOWEST = tl.constexpr(-3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_queries(
    query_ptr,  # [num_rows, num_heads, head_size]
    kv_head,
    row,  # [block_m]
    member,  # [block_m]
    num_rows,
    stride_row,
    stride_head,
    group: tl.constexpr,
    head_size: tl.constexpr,
    block_d: tl.constexpr,
):
    column = tl.arange(0, block_d)
    live = (row < num_rows) & (member < group)
    head = kv_head * group + member
    offset = row.to(tl.int64) * stride_row + head * stride_head
    return tl.load(
        query_ptr + offset[:, None] + column[None, :],
        mask=live[:, None] & (column < head_size)[None, :],
        other=0.0,
    )


@triton.jit
def _load_keys(
    key_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks_ptr,  # [num_request_blocks]
    kv_head,
    key,  # [block_n] positions
    num_tokens,
    stride_block,
    stride_head,
    stride_slot,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    block_d: tl.constexpr,
):
    column = tl.arange(0, block_d)
    exists = key < num_tokens
    block = tl.load(blocks_ptr + key // block_size, mask=exists, other=0).to(tl.int64)
    slot = (key % block_size).to(tl.int64)
    offset = block * stride_block + kv_head * stride_head + slot * stride_slot
    return tl.load(
        key_ptr + offset[:, None] + column[None, :],
        mask=exists[:, None] & (column < head_size)[None, :],
        other=0.0,
    )


@triton.jit
def _logits(
    queries,  # [block_m, block_d]
    keys,  # [block_n, block_d]
    row,  # [block_m]
    key,  # [block_n]
    num_rows,
    num_tokens,
    scale,
    soft_cap,
    has_soft_cap: tl.constexpr,
):
    """To the base 2; minus infinity where a key lies behind its row."""
    keys = tl.trans(keys.to(queries.dtype))
    # Of fp32 alone: as exact as FMA, which would need more registers than there are.
    logits = tl.dot(queries, keys, input_precision="tf32x3") * scale
    if has_soft_cap:
        decay = tl.exp2(tl.abs(logits) * (-2 * LOG2_E / soft_cap))
        tanh = (1 - decay) / (1 + decay)
        logits = tl.where(logits < 0, -tanh, tanh) * soft_cap
    seen = key[None, :] <= (num_tokens - num_rows + row)[:, None]
    return tl.where(seen, logits * LOG2_E, float("-inf"))


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "num_splits"],
    do_not_specialize_on_alignment=["blocks_ptr"],
)
def _sum_rows_kernel(
    maximum_ptr,  # [num_kv_heads, num_splits, num_packed]
    total_ptr,  # [num_kv_heads, num_splits, num_packed]
    query_ptr,  # [num_rows, num_heads, head_size]
    key_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks_ptr,  # [num_request_blocks]
    k_scale_ptr,  # [1] or None
    num_rows,
    num_tokens,
    num_packed,
    num_splits,
    keys_per_split,
    scale,
    soft_cap,
    query_stride_row,
    query_stride_head,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    has_soft_cap: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
):
    # A program owns one split of one KV head's keys and block_m (row, member) pairs.
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    packed = tl.program_id(2) * block_m + tl.arange(0, block_m)
    row, member = packed // group_padded, packed % group_padded
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr)
    queries = _load_queries(
        query_ptr,
        kv_head,
        row,
        member,
        num_rows,
        query_stride_row,
        query_stride_head,
        group,
        head_size,
        block_d,
    )
    maximum = tl.full([block_m], LOWEST, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    start = split * keys_per_split
    end = tl.minimum(start + keys_per_split, num_tokens)
    for first in range(start, end, block_n):
        key = first + tl.arange(0, block_n)
        keys = _load_keys(
            key_ptr,
            blocks_ptr,
            kv_head,
            key,
            num_tokens,
            key_stride_block,
            key_stride_head,
            key_stride_slot,
            head_size,
            block_size,
            block_d,
        )
        logits = _logits(
            queries, keys, row, key, num_rows, num_tokens, scale, soft_cap, has_soft_cap
        )
        highest = tl.maximum(maximum, tl.max(logits, 1))
        added = tl.sum(tl.exp2(logits - highest[:, None]), 1)
        total = total * tl.exp2(maximum - highest) + added
        maximum = highest
    offset = (kv_head * num_splits + split) * num_packed + packed
    tl.store(maximum_ptr + offset, maximum)
    tl.store(total_ptr + offset, total)


@triton.jit
def _combine_splits(
    maximum_ptr,  # [num_kv_heads, num_splits, num_packed]
    total_ptr,  # [num_kv_heads, num_splits, num_packed]
    kv_head,
    packed,  # [block_m]
    num_packed,
    num_splits,
    max_splits: tl.constexpr,
):
    split = tl.arange(0, max_splits)
    offset = (kv_head * num_splits + split)[:, None] * num_packed + packed[None, :]
    exists = (split < num_splits)[:, None]
    maxima = tl.load(maximum_ptr + offset, mask=exists, other=LOWEST)
    totals = tl.load(total_ptr + offset, mask=exists, other=0.0)
    maximum = tl.max(maxima, 0)
    return maximum, tl.sum(totals * tl.exp2(maxima - maximum[None, :]), 0)


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "num_splits"],
    do_not_specialize_on_alignment=["blocks_ptr"],
)
def _add_probabilities_kernel(
    scores_ptr,  # [num_heads, stride_head]
    maximum_ptr,  # [num_kv_heads, num_splits, num_packed]
    total_ptr,  # [num_kv_heads, num_splits, num_packed]
    query_ptr,  # [num_rows, num_heads, head_size]
    key_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    blocks_ptr,  # [num_request_blocks]
    k_scale_ptr,  # [1] or None
    num_rows,
    num_tokens,
    num_packed,
    num_splits,
    scale,
    soft_cap,
    scores_stride_head,
    query_stride_row,
    query_stride_head,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    head_size: tl.constexpr,
    block_size: tl.constexpr,
    has_soft_cap: tl.constexpr,
    max_splits: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
):
    # A program owns block_n keys of one KV head, and reads them once for all rows.
    kv_head = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * block_n + tl.arange(0, block_n)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr)
    keys = _load_keys(
        key_ptr,
        blocks_ptr,
        kv_head,
        key,
        num_tokens,
        key_stride_block,
        key_stride_head,
        key_stride_slot,
        head_size,
        block_size,
        block_d,
    )
    scores = tl.zeros([group_padded, block_n], tl.float32)
    for first in range(0, num_packed, block_m):
        packed = first + tl.arange(0, block_m)
        row, member = packed // group_padded, packed % group_padded
        queries = _load_queries(
            query_ptr,
            kv_head,
            row,
            member,
            num_rows,
            query_stride_row,
            query_stride_head,
            group,
            head_size,
            block_d,
        )
        maximum, total = _combine_splits(
            maximum_ptr,
            total_ptr,
            kv_head,
            packed,
            num_packed,
            num_splits,
            max_splits,
        )
        logits = _logits(
            queries, keys, row, key, num_rows, num_tokens, scale, soft_cap, has_soft_cap
        )
        weight = tl.where(row < num_rows, 1.0 / total, 0.0)
        shares = tl.exp2(logits - maximum[:, None]) * weight[:, None]
        by_row = tl.reshape(shares, [block_m // group_padded, group_padded, block_n])
        scores += tl.sum(by_row, 0)
    member = tl.arange(0, group_padded)
    offset = (kv_head * group + member) * scores_stride_head
    # Rows of `scores` are whole tiles long, so that stores stay aligned without a mask.
    tl.store(
        scores_ptr + offset[:, None] + key[None, :],
        scores,
        mask=(member < group)[:, None],
    )


def vision_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum attention probabilities over query rows, for every head and key.

    Probabilities are normalised over every key a row attends to (A-VL section
    "Vision attention").

    Args:
        query: [num_rows, num_heads, head_size], the last rows of the sequence; fp16,
            bf16 or fp32, any strides but the last.
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides
            but the last; `query`'s dtype, or float8_e4m3fn from sm_89 on.
        blocks: [cdiv(num_tokens, block_size)] block ids of the sequence, int32 or
            int64.
        num_tokens: keys in the sequence; row i attends to the first
            num_tokens - num_rows + 1 + i of them.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.
        k_scale: [1] fp32, what fp8 keys are multiplied with.

    Returns:
        [num_heads, num_tokens] fp32, a view of longer rows.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[1]
    group = triton.next_power_of_2(num_heads // num_kv_heads)
    block_m, block_n = _tile_sizes(query, key_cache, num_rows, group)
    num_packed = triton.cdiv(num_rows * group, block_m) * block_m
    num_tiles = triton.cdiv(num_tokens, block_n)
    keys_per_split = max(KEYS_PER_SPLIT, triton.cdiv(num_tiles, MAX_SPLITS) * block_n)
    num_splits = triton.cdiv(num_tokens, keys_per_split)
    # One piece, two outputs: maxima and sums.
    parts = query.new_empty(
        2, num_kv_heads, num_splits, num_packed, dtype=torch.float32
    )
    scores = query.new_empty(num_heads, num_tiles * block_n, dtype=torch.float32)
    inputs = (*parts, query, key_cache, blocks, k_scale)
    strides = (*query.stride()[:2], *key_cache.stride()[:3])
    constants = {
        "group": num_heads // num_kv_heads,
        "group_padded": group,
        "head_size": head_size,
        "block_size": key_cache.shape[2],
        "has_soft_cap": soft_cap > 0,
        "block_m": block_m,
        "block_n": block_n,
        "block_d": triton.next_power_of_2(head_size),
    }
    sizes = (num_rows, num_tokens, num_packed, num_splits)
    factors = (float(scale), float(soft_cap))
    _sum_rows_kernel[num_splits, num_kv_heads, num_packed // block_m](
        *inputs, *sizes, keys_per_split, *factors, *strides, **constants
    )
    _add_probabilities_kernel[num_tiles, num_kv_heads](
        scores,
        *inputs,
        *sizes,
        *factors,
        scores.stride(0),
        *strides,
        max_splits=MAX_SPLITS,
        **constants,
    )
    return scores[:, :num_tokens]


def _tile_sizes(
    query: torch.Tensor, key_cache: torch.Tensor, num_rows: int, group: int
) -> tuple[int, int]:
    """(row, member) pairs and keys in a tile, so that registers suffice."""
    is_fp32 = query.dtype == torch.float32
    is_converted = query.dtype != key_cache.dtype
    is_wide = query.shape[2] > 128
    block_m = min(triton.next_power_of_2(num_rows * group), 16 if is_fp32 else 64)
    block_n = 32 if is_fp32 or is_converted or is_wide else 64
    return max(block_m, group, 16), block_n
