"""Scores cached tokens by the attention the last rows of a sequence pay them.

A thread takes a query head: its logits, at most [num_rows, num_tokens], become weights
`PART` slots at a time, and are summed over rows when the whole rows' sums are known.
Heads that do not go into the threads evenly are shared out by parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.queries import lay_queries
from vllm_avl.kernels.cpu.softmax import STEP, cap, exponentiate, finite, scaled
from vllm_avl.kernels.cpu.threads import (
    Loop,
    array_at,
    compiled,
    num_threads,
    share,
    thread_index,
    wait_for_all,
)
from vllm_avl.kernels.cpu.tiles import PART, ROWS, TILE, dot_tile
from vllm_avl.kernels.cpu.vectors import (
    CODES,
    ELEMENTS,
    load,
    multiply_add,
    splat,
    store,
)


@compiled
def _part_weights(call: Any, head: int, part: int, queries: int, weights: int) -> None:
    """Weights of a part's slots, and what they are normalised by."""
    rows, size, block_size = call.num_rows, call.head_size, call.block_size
    itemsize = call.itemsize
    blocks = array_at(call.blocks, types.int32, (call.num_blocks,))
    head_bytes = 2 * block_size * size * itemsize
    cache = call.cache + head // call.group * head_bytes
    first = part * PART
    num_tiles = (min(first + PART, call.num_tokens) - first + TILE - 1) // TILE
    for tile in range(num_tiles):
        block, slot = divmod(first + tile * TILE, block_size)
        keys = cache + blocks[block] * (call.num_kv_heads * head_bytes)
        keys += slot * itemsize
        for row in range(0, rows, ROWS):
            dot_tile(
                call.element,
                keys,
                block_size * itemsize,
                size,
                queries + 4 * row,
                4 * rows,
                min(rows - row, ROWS),
                weights + 4 * (row * PART + tile * TILE),
                keys,
            )
    count = num_tiles * TILE
    logits = array_at(weights, types.float32, (rows, PART))
    norms = array_at(weights + 4 * rows * PART, types.float32, (rows, 2))
    for row in range(rows):
        at = weights + 4 * row * PART
        if call.soft_cap > 0:
            cap(at, count, call.soft_cap)
        for slot in range(max(call.num_tokens - rows + 1 + row - first, 0), count):
            logits[row, slot] = -np.inf
        exponentiate(at, count, norms[row])


@compiled
def _factors(call: Any, weights: int, part_bytes: int, factors: Any) -> None:
    """What each row's weights are multiplied with in each part, to sum to 1."""
    rows = call.num_rows
    for row in range(rows):
        largest = np.float32(-np.inf)
        for part in range(len(factors)):
            at = weights + part * part_bytes + 4 * rows * PART
            norm = array_at(at, types.float32, (rows, 2))[row]
            largest = max(largest, norm[0])
        shift, total = finite(largest), np.float32(0)
        for part in range(len(factors)):
            at = weights + part * part_bytes + 4 * rows * PART
            norm = array_at(at, types.float32, (rows, 2))[row]
            factors[part, row] = scaled(np.float32(1), norm[0], shift)
            total += factors[part, row] * norm[1]
        for part in range(len(factors)):
            factors[part, row] /= total


@compiled
def _sum_rows(call: Any, head: int, part: int, weights: int, factors: Any) -> None:
    """Write a part's scores."""
    first = part * PART
    count = min(first + PART, call.num_tokens) - first
    sums = weights + 4 * PART * call.num_rows + 8 * call.num_rows
    for at in range(0, 4 * count, STEP):
        total = splat(np.float32(0))
        for row in range(call.num_rows):
            weight = load(weights + 4 * row * PART + at)
            total = multiply_add(weight, splat(factors[row]), total)
        store(sums + at, total)
    scores = array_at(call.scores, types.float32, (call.num_heads, call.num_tokens))
    summed = array_at(sums, types.float32, (count,))
    for slot in range(count):
        scores[head, first + slot] = summed[slot]


def _scores(data: Any) -> None:
    call = carray(data, 1)[0]
    rows, parts = call.num_rows, (call.num_tokens + PART - 1) // PART
    part_bytes = 4 * PART * (rows + 1) + 8 * rows
    index, threads = np.int64(thread_index()), np.int64(num_threads())
    queries = call.scratch + index * call.scratch_step
    query_bytes = 4 * (rows + 1) * call.head_size
    factors_at = queries + query_bytes
    factors = array_at(factors_at, types.float32, (parts, rows))
    own = factors_at + 4 * parts * rows
    even = call.num_heads // threads * threads
    for head in range(index, even, threads):
        query = call.query + head * call.head_step
        lay_queries(
            query, call.row_step, call.code, call.scale, rows, call.head_size, queries
        )
        for part in range(parts):
            _part_weights(call, head, part, queries, own + part * part_bytes)
        _factors(call, own, part_bytes, factors)
        for part in range(parts):
            _sum_rows(call, head, part, own + part * part_bytes, factors[part])
    if even == call.num_heads:
        return
    wait_for_all()
    first, end = share((call.num_heads - even) * parts)
    for phase in range(2):
        laid = -1
        for item in range(first, end):
            turn, part = divmod(item, parts)
            shared = own + (turn - index) * call.scratch_step
            head = even + turn
            if phase == 0:
                if laid != head:
                    lay_queries(
                        call.query + head * call.head_step,
                        call.row_step,
                        call.code,
                        call.scale,
                        rows,
                        call.head_size,
                        queries,
                    )
                _part_weights(call, head, part, queries, shared + part * part_bytes)
            else:
                if laid != head:
                    _factors(call, shared, part_bytes, factors)
                at = shared + part * part_bytes
                _sum_rows(call, head, part, at, factors[part])
            laid = head
        if phase == 0:
            wait_for_all()


LOOP = Loop(
    _scores,
    [
        *("cache", "num_kv_heads", "block_size", "itemsize", "blocks", "num_blocks"),
        *("query", "row_step", "head_step", "code", "num_rows", "num_heads"),
        *("head_size", "group", "num_tokens", "scores", "scratch", "scratch_step"),
    ],
    ["scale", "soft_cap"],
)


def attention_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Sum attention probabilities over query rows, for every head and key.

    Probabilities are normalised over every key a row attends to (A-VL section
    "Vision attention"). Beside the scores, each thread holds the logits of one head.

    Args:
        query: [num_rows, num_heads, head_size], the last rows of the sequence.
        kv_cache: as this package describes.
        blocks: [cdiv(num_tokens, block_size) or more] block ids of the sequence, int32.
        num_tokens: keys in the sequence; row i attends to the first
            num_tokens - num_rows + 1 + i of them.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.

    Returns:
        [num_heads, num_tokens] fp32.
    """
    if query.dtype not in CODES:
        query = query.float()
    num_rows, num_heads, head_size = query.shape
    _, num_kv_heads, _, block_elements = kv_cache.shape
    assert kv_cache.is_contiguous()
    assert blocks.dtype == torch.int32
    assert blocks.is_contiguous()
    assert query.stride(2) == 1
    parts = -(-num_tokens // PART)
    scores = torch.empty(num_heads, num_tokens, dtype=torch.float32)
    size = (num_rows + 1) * head_size + parts * num_rows
    size += parts * (PART * (num_rows + 1) + 2 * num_rows)
    size = -(-size // 16) * 16
    scratch = torch.empty(torch.get_num_threads(), size, dtype=torch.float32)
    LOOP.run(
        ELEMENTS[kv_cache.dtype],
        kv_cache.data_ptr(),
        num_kv_heads,
        block_elements // head_size,
        kv_cache.element_size(),
        blocks.data_ptr(),
        len(blocks),
        query.data_ptr(),
        query.stride(0) * query.element_size(),
        query.stride(1) * query.element_size(),
        CODES[query.dtype],
        num_rows,
        num_heads,
        head_size,
        num_heads // num_kv_heads,
        num_tokens,
        scores.data_ptr(),
        scratch.data_ptr(),
        4 * size,
        scale,
        soft_cap,
    )
    return scores
