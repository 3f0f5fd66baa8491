"""Split-KV flash decoding that gathers the selected rows inside the matmul."""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from vllm_avl.kernels.cuda.selected_rows import count_tiles, request_reads, rows_of_tile
from vllm_avl.kernels.cuda.splits import combine, normalise

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_BLOCK_M = 32


@dataclass(frozen=True)
class Tile:
    """Rows read at a time, and how the compiler overlaps and shares the reading."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 3


# By bytes of a cached element and padded head size: two tiles of keys and values in
# flight take at most 84 KiB of shared memory, and no configuration spills.
TILES = {
    (1, 64): Tile(64),
    (1, 128): Tile(64),
    (1, 256): Tile(32),
    (2, 64): Tile(64),
    (2, 128): Tile(64),
    (2, 256): Tile(32),
    (4, 64): Tile(32),
    (4, 128): Tile(16),
    (4, 256): Tile(16, num_stages=2),
}


@dataclass(frozen=True)
class Refresh:
    """Asks for what one query row of some requests looks at.

    Attributes:
        scored: [num_reqs] int32, which query row of a request is scored, counted from
            its last one, which is 1; 0 where none is.
        scores: [num_kv_heads, num_blocks * block_size] fp32. At the cache rows that a
            scored row reads: attention probabilities, summed over the query heads
            of a KV head. Left alone elsewhere.
        logits: [num_heads, num_blocks * block_size] fp32, scratch.
    """

    scored: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor


def selected_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    first_slot: torch.Tensor,
    core_list: torch.Tensor,
    num_core: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    *,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    max_query_len: int = 1,
    num_splits: int = 1,
    partial: tuple[torch.Tensor, torch.Tensor] | None = None,
    refresh: Refresh | None = None,
) -> None:
    """Attend from each request's query rows to a list of slots and a tail of slots.

    A slot is a logical position of a request. Its cache row is
    `block_table[request, slot // block_size] * block_size + slot % block_size`.
    A request reads its `num_core` listed slots, all in the past, and the slots from
    `first_slot` to `seq_lens`, of which row i of n does not see the last n - 1 - i.
    The launch depends on shapes and host integers alone: a CUDA graph may hold it.

    Args:
        query: [num_tokens, num_heads, head_size].
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], contiguous in
            head_size alone; of query's dtype or float8_e4m3fn.
        value_cache: as key_cache.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32, the request's own query rows included.
        query_start_loc: [num_reqs + 1] int32.
        first_slot: [num_reqs] int32.
        core_list: [1 or num_kv_heads, num_blocks * block_size] int32. Entry i of a
            request lies at the cache row of its slot i.
        num_core: [num_reqs] int32; the listed slots lie outside the tail.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.
        output: as query; tokens of no request are left alone.
        lse: [num_tokens, num_heads] fp32, receives the log-sum-exp to base 2, in which
                scores are made of logits without a rounding between.
        k_scale: [1] fp32, what keys of an fp8 cache are multiplied by.
        v_scale: as k_scale, for values.
        max_query_len: no request has more query rows.
        num_splits: programs that share the rows of one request and KV head.
        partial: scratch for more than one split, allocated if not given: fp32
            [num_tokens, num_heads, num_splits, head_size], and without head_size.
        refresh: scores some of the requests from the same read.
    """
    assert all(x.stride(-1) == 1 for x in (query, key_cache, value_cache, output))
    if lse is None:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if num_splits == 1:
        partial = output.unsqueeze(2), lse.unsqueeze(2)
    elif partial is None:
        partial = _new_partial(query, num_splits)
    requests = query_start_loc, seq_lens
    ranking_stride = core_list.stride(0) if len(core_list) > 1 else 0
    tables = block_table, core_list, block_table.stride(0), ranking_stride
    reads = *tables, first_slot, num_core
    caches = key_cache, value_cache, k_scale, v_scale
    options = scale, soft_cap, max_query_len
    _attend(partial, query, caches, requests, reads, refresh, options)
    if num_splits > 1:
        combine(output, lse, partial, query_start_loc, max_query_len)
    if refresh:
        normalise(refresh, lse, requests, reads, key_cache)


def attention_constants(
    head_size: int, cache_dtype: torch.dtype, group: int, max_query_len: int
) -> dict[str, int]:
    """Compile-time sizes and launch options of the attention kernel.

    Args:
        head_size: elements of a row.
        cache_dtype: what a row is made of.
        group: query heads that share a KV head.
        max_query_len: as for `selected_attention`.
    """
    head_pad = triton.next_power_of_2(head_size)
    wanted = triton.next_power_of_2(group * max_query_len)
    # tl.dot takes 16 rows at least; a group is never torn apart.
    block_m = max(16, min(wanted, MAX_BLOCK_M), triton.next_power_of_2(group))
    block_q = min(block_m // group, max_query_len)
    return {
        "group": group,
        "head_size": head_size,
        "head_pad": head_pad,
        "block_m": block_m,
        "block_q": block_q,
        "query_blocks": triton.cdiv(max_query_len, block_q),
        **asdict(TILES[cache_dtype.itemsize, max(head_pad, 64)]),
    }


def _attend(partial, query, caches, requests, reads, refresh, options):
    output, lse = partial
    key_cache, value_cache, k_scale, v_scale = caches
    scale, soft_cap, max_query_len = options
    assert lse.is_contiguous()
    _, num_kv_heads, block_size, head_size = key_cache.shape
    group = query.shape[1] // num_kv_heads
    constants = attention_constants(head_size, key_cache.dtype, group, max_query_len)
    num_splits = lse.shape[2]
    query_blocks = len(requests[1]) * constants["query_blocks"]
    _attention_kernel[(query_blocks, num_kv_heads, num_splits)](
        output,
        lse,
        refresh.logits if refresh else None,
        query,
        key_cache,
        value_cache,
        k_scale,
        v_scale,
        *requests,
        reads,
        refresh.scored if refresh else None,
        scale,
        output.stride()[:2],
        query.stride()[:2],
        key_cache.stride()[:3],
        value_cache.stride()[:3],
        refresh.logits.stride(0) if refresh else 0,
        num_splits=num_splits,
        soft_cap=soft_cap,
        block_size=block_size,
        **constants,
    )


def _new_partial(query, num_splits):
    num_tokens, num_heads, head_size = query.shape
    shape = num_tokens, num_heads, num_splits
    output = query.new_empty(*shape, head_size, dtype=torch.float32)
    return output, query.new_empty(shape, dtype=torch.float32)


@triton.jit
def _attention_kernel(
    output_ptr,  # [num_tokens, num_heads, num_splits, head_size]
    lse_ptr,  # [num_tokens, num_heads, num_splits] fp32, base 2
    logits_ptr,  # [num_heads, num_blocks * block_size] fp32, base 2, or None
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,  # as key_cache
    k_scale_ptr,  # [1] fp32 or None
    v_scale_ptr,  # [1] fp32 or None
    query_start_loc_ptr,  # [num_reqs + 1]
    seq_lens_ptr,  # [num_reqs]
    reads,  # pointers and strides, see request_reads
    scored_ptr,  # [num_reqs] or None
    scale,
    output_strides,  # token, head
    query_strides,  # token, head
    key_strides,  # block, head, slot
    value_strides,  # block, head, slot
    logits_stride,
    num_splits: tl.constexpr,
    soft_cap: tl.constexpr,
    block_size: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    head_pad: tl.constexpr,
    block_m: tl.constexpr,
    block_q: tl.constexpr,
    query_blocks: tl.constexpr,
    block_n: tl.constexpr,
):
    # One request's block of query rows, one KV head, one share of the tiles it reads.
    request = tl.program_id(0).to(tl.int64) // query_blocks
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    first_token = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - first_token
    first_row = tl.program_id(0) % query_blocks * block_q
    if first_row >= query_len:
        return

    packed = tl.arange(0, block_m)
    row = first_row + packed // group
    is_row = (packed < block_q * group) & (row < query_len)
    head = kv_head * group + packed % group
    token = (first_token + row).to(tl.int64)
    num_seen = tl.load(seq_lens_ptr + request) - query_len + 1 + row
    tail_end = tl.max(tl.where(is_row, num_seen, 0), 0)
    reads = request_reads(reads, request, kv_head, tail_end)
    num_tiles = count_tiles(reads, block_n)
    share = tl.cdiv(num_tiles, num_splits)
    begin = split * share
    stop = tl.minimum(begin + share, num_tiles)
    lse_ptr += (token * group * tl.num_programs(1) + head) * num_splits + split
    if num_splits > 1 and begin >= stop:
        tl.store(lse_ptr, -float("inf"), mask=is_row)
        return

    dims = tl.arange(0, head_pad)
    is_element = is_row[:, None] & (dims < head_size)[None, :]
    query_rows = token * query_strides[0] + head * query_strides[1]
    query_ptrs = query_ptr + query_rows[:, None] + dims[None, :]
    query = tl.load(query_ptrs, mask=is_element, other=0.0)
    key_cache_ptr += kv_head * key_strides[1]
    value_cache_ptr += kv_head * value_strides[1]
    scale *= LOG2_E
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr)
    if scored_ptr is not None:
        is_scored = tl.load(scored_ptr + request) != 0
        logits_ptr += (head * logits_stride)[:, None]

    # Finite, so that a row that sees nothing of its first tiles stays free of NaN.
    peak = tl.full([block_m], -1e30, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    mean = tl.zeros([block_m, head_pad], tl.float32)
    # Rows are looked up one tile ahead: the compiler overlaps loads whose addresses
    # it has, not loads that wait for an index.
    cache_row, slot, is_read = rows_of_tile(begin, reads, block_size, block_n)
    for tile in tl.range(begin, stop):
        ahead = rows_of_tile(tile + 1, reads, block_size, block_n)
        block = (cache_row // block_size).to(tl.int64)[:, None]
        in_block = (cache_row % block_size)[:, None]
        mask = is_read[:, None] & (dims < head_size)[None, :]
        key_rows = block * key_strides[0] + in_block * key_strides[2]
        keys = tl.load(key_cache_ptr + key_rows + dims[None, :], mask=mask, other=0.0)
        value_rows = block * value_strides[0] + in_block * value_strides[2]
        value_ptrs = value_cache_ptr + value_rows + dims[None, :]
        values = tl.load(value_ptrs, mask=mask, other=0.0)
        keys = tl.trans(keys.to(query.dtype))
        logits = tl.dot(query, keys, input_precision="ieee") * scale
        if soft_cap > 0:
            logits = _soft_cap(logits, soft_cap * LOG2_E)
        if scored_ptr is not None and is_scored:
            # Looked up anew: kept beside the tiles, it spills.
            scored_row = query_len - tl.load(scored_ptr + request)
            is_scored_row = (is_row & (row == scored_row))[:, None]
            stored = is_scored_row & is_read[None, :]
            tl.store(logits_ptr + cache_row[None, :], logits, mask=stored)
        is_seen = is_read[None, :] & (slot[None, :] < num_seen[:, None])
        logits = tl.where(is_seen, logits, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(logits - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mean *= shrink[:, None]
        weights, values = weights.to(query.dtype), values.to(query.dtype)
        mean = tl.dot(weights, values, mean, input_precision="ieee")
        peak = new_peak
        cache_row, slot, is_read = ahead

    mean /= tl.where(total > 0, total, 1.0)[:, None]
    if v_scale_ptr is not None:
        mean *= tl.load(v_scale_ptr)
    output_rows = token * output_strides[0] + head * output_strides[1]
    output_ptrs = output_ptr + output_rows[:, None] + split * head_size + dims[None, :]
    tl.store(output_ptrs, mean.to(output_ptr.dtype.element_ty), mask=is_element)
    tl.store(lse_ptr, peak + tl.log2(total), mask=is_row)


@triton.jit
def _soft_cap(logits, cap: tl.constexpr):
    """Cap times tanh(logits / cap); where exp2 overflows, that is the limit."""
    return cap - 2 * cap / (tl.exp2(logits * (2 * LOG2_E / cap)) + 1)
