"""Puts together what splits of a row have attended, and makes scores of its logits."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from vllm_avl.kernels.cuda.selected_rows import count_tiles, request_reads, rows_of_tile

NORMALISE_BLOCK_N = 128


NORMALISE_PROGRAMS = 8


def combine(output, lse, partial, query_start_loc, max_query_len):
    """Write output and log-sum-exp of each row, from those of its splits."""
    _, num_heads, num_splits, head_size = partial[0].shape
    _combine_kernel[(len(query_start_loc) - 1, max_query_len, num_heads)](
        output,
        lse,
        *partial,
        query_start_loc,
        output.stride()[:2],
        partial[0].stride()[:2],
        num_splits=num_splits,
        splits_pad=triton.next_power_of_2(num_splits),
        head_size=head_size,
        head_pad=triton.next_power_of_2(head_size),
    )


def normalise(refresh, lse, requests, reads, key_cache):
    """Write the scores that `refresh` asks for, from logits of the same pass."""
    _, num_kv_heads, block_size, _ = key_cache.shape
    group = lse.shape[1] // num_kv_heads
    _normalise_kernel[(len(requests[1]), num_kv_heads, NORMALISE_PROGRAMS)](
        refresh.scores,
        refresh.logits,
        lse,
        *requests,
        reads,
        refresh.scored,
        refresh.scores.stride(0),
        refresh.logits.stride(0),
        group=group,
        group_pad=triton.next_power_of_2(group),
        block_size=block_size,
        block_n=NORMALISE_BLOCK_N,
    )


@triton.jit
def _combine_kernel(
    output_ptr,  # [num_tokens, num_heads, head_size]
    lse_ptr,  # [num_tokens, num_heads] fp32, base 2
    split_output_ptr,  # [num_tokens, num_heads, num_splits, head_size] fp32
    split_lse_ptr,  # [num_tokens, num_heads, num_splits] fp32, base 2
    query_start_loc_ptr,  # [num_reqs + 1]
    output_strides,  # token, head
    split_strides,  # token, head
    num_splits: tl.constexpr,
    splits_pad: tl.constexpr,
    head_size: tl.constexpr,
    head_pad: tl.constexpr,
):
    # One head of one query row of one request.
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    token = tl.load(query_start_loc_ptr + request).to(tl.int64) + tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + request + 1):
        return

    split = tl.arange(0, splits_pad)
    dims = tl.arange(0, head_pad)
    lse_row = token * tl.num_programs(2) + head
    lse_ptrs = split_lse_ptr + lse_row * num_splits + split
    split_lse = tl.load(lse_ptrs, mask=split < num_splits, other=-float("inf"))
    peak = tl.maximum(tl.max(split_lse, 0), -1e30)
    weights = tl.exp2(split_lse - peak)
    total = tl.sum(weights, 0)
    # An idle split has written no output.
    mask = (weights > 0)[:, None] & (dims < head_size)[None, :]
    split_output_ptr += token * split_strides[0] + head * split_strides[1]
    row_ptrs = split_output_ptr + split[:, None] * head_size + dims[None, :]
    rows = tl.load(row_ptrs, mask=mask, other=0.0)
    mean = tl.sum(rows * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    output_ptr += token * output_strides[0] + head * output_strides[1]
    mean = mean.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + dims, mean, mask=dims < head_size)
    tl.store(lse_ptr + lse_row, peak + tl.log2(total))


@triton.jit
def _normalise_kernel(
    scores_ptr,  # [num_kv_heads, num_blocks * block_size] fp32
    logits_ptr,  # [num_heads, num_blocks * block_size] fp32, base 2
    lse_ptr,  # [num_tokens, num_heads] fp32, base 2
    query_start_loc_ptr,  # [num_reqs + 1]
    seq_lens_ptr,  # [num_reqs]
    reads,  # pointers and strides, see request_reads
    scored_ptr,  # [num_reqs]
    scores_stride,
    logits_stride,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
):
    # One scored row and KV head, every so many-th tile of what it read.
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    next_token = tl.load(query_start_loc_ptr + request + 1).to(tl.int64)
    is_empty = next_token == tl.load(query_start_loc_ptr + request)
    scored = tl.load(scored_ptr + request)
    if is_empty | (scored == 0):
        return

    member = tl.arange(0, group_pad)
    head = kv_head * group + member
    num_heads = group * tl.num_programs(1)
    lse_ptrs = lse_ptr + (next_token - scored) * num_heads + head
    lse = tl.load(lse_ptrs, mask=member < group, other=0.0)
    tail_end = tl.load(seq_lens_ptr + request) + 1 - scored
    reads = request_reads(reads, request, kv_head, tail_end)
    logits_ptr += (head * logits_stride)[:, None]
    scores_ptr += kv_head * scores_stride
    num_tiles = count_tiles(reads, block_n)
    for tile in tl.range(tl.program_id(2), num_tiles, tl.num_programs(2)):
        cache_row, _, is_read = rows_of_tile(tile, reads, block_size, block_n)
        mask = (member < group)[:, None] & is_read[None, :]
        logit_ptrs = logits_ptr + cache_row[None, :]
        logits = tl.load(logit_ptrs, mask=mask, other=-float("inf"))
        scores = tl.sum(tl.exp2(logits - lse[:, None]), 0)
        tl.store(scores_ptr + cache_row, scores, mask=is_read)
