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
from vllm_avl.kernels.cpu.softmax import STEP, cap, exponentiate, normalise
from vllm_avl.kernels.cpu.threads import (
    Loop,
    compiled,
    inlined,
    num_threads,
    read,
    share,
    thread_index,
    wait_for_all,
    write,
)
from vllm_avl.kernels.cpu.tiles import PART, TILE, dot_tile, rows_at_once
from vllm_avl.kernels.cpu.vectors import (
    CODES,
    ELEMENTS,
    load,
    multiply_add,
    splat,
    store,
)


@compiled
def _keys_at(call: Any, head: int, slot: int) -> int:
    """Address of a slot's key, in the KV head of a head."""
    block, rest = divmod(slot, call.block_size)
    half = call.block_size * call.head_size * call.itemsize
    number = np.int64(read(call.blocks, types.int32, block)) * call.num_kv_heads
    return call.cache + (number + head // call.group) * 2 * half + rest * call.itemsize


@inlined
def _part_weights(call: Any, head: int, part: int, queries: int, weights: int) -> None:
    """Weights of a part's slots, and what they are normalised by."""
    rows, size = call.num_rows, call.head_size
    first = part * PART
    num_tiles = (min(first + PART, call.num_tokens) - first + TILE - 1) // TILE
    ahead = _keys_at(call, head, first)
    for tile in range(num_tiles):
        keys = ahead
        later = first + (tile + 1) * TILE
        if later < call.num_tokens:
            ahead = _keys_at(call, head, later)
        row = 0
        while row < rows:
            at_once = rows_at_once(rows - row)
            dot_tile(
                call.element,
                keys,
                call.block_size * call.itemsize,
                size,
                queries + 4 * row,
                4 * rows,
                at_once,
                weights + 4 * (row * PART + tile * TILE),
                ahead,
            )
            row += at_once
    count = num_tiles * TILE
    norms = weights + 4 * rows * PART
    for row in range(rows):
        at = weights + 4 * row * PART
        if call.soft_cap > 0:
            cap(at, count, call.soft_cap)
        for slot in range(max(call.num_tokens - rows + 1 + row - first, 0), count):
            write(at, types.float32, slot, -np.inf)
        exponentiate(at, count, norms + 8 * row)


@compiled
def _sum_rows(call: Any, head: int, part: int, weights: int) -> None:
    """Write a part's scores, of weights and what normalises them."""
    first = part * PART
    count = min(first + PART, call.num_tokens) - first
    norms = weights + 4 * PART * call.num_rows
    sums = norms + 8 * call.num_rows
    for at in range(0, 4 * count, STEP):
        total = splat(np.float32(0))
        for row in range(call.num_rows):
            weight = load(weights + 4 * row * PART + at)
            factor = splat(read(norms, types.float32, 2 * row))
            total = multiply_add(weight, factor, total)
        store(sums + at, total)
    scores = call.scores + 4 * (head * call.num_tokens + first)
    for slot in range(count):
        write(scores, types.float32, slot, read(sums, types.float32, slot))


@compiled
def _weigh(call: Any, head: int, first: int, end: int, weights: int) -> None:
    """Weights of some parts of a head, not yet normalised."""
    queries = call.scratch + np.int64(thread_index()) * call.scratch_step
    query = call.query + head * call.head_step
    rows, size = call.num_rows, call.head_size
    lay_queries(query, call.row_step, call.code, call.scale, rows, size, queries)
    for part in range(first, end):
        _part_weights(call, head, part, queries, weights + part * call.part_step)


def _scores(data: Any) -> None:
    call = carray(data, 1)[0]
    rows, parts = call.num_rows, (call.num_tokens + PART - 1) // PART
    threads = np.int64(num_threads())
    for first_head in range(0, call.num_heads, threads):
        heads = min(threads, call.num_heads - first_head)
        # With a head for every thread, each thread's share is one head.
        together = heads < threads
        if together:
            wait_for_all()
        first, end = share(heads * parts)
        for turn in range(first // parts, (end + parts - 1) // parts):
            weights = call.weights + turn * call.scratch_step
            begin, stop = max(first - turn * parts, 0), min(end - turn * parts, parts)
            _weigh(call, first_head + turn, begin, stop, weights)
        if together:
            wait_for_all()
        first_row, end_row = share(heads * rows)
        for item in range(first_row, end_row):
            turn, row = divmod(item, rows)
            norms = call.weights + turn * call.scratch_step + 4 * PART * rows + 8 * row
            normalise(norms, call.part_step, parts)
        if together:
            wait_for_all()
        for item in range(first, end):
            turn, part = divmod(item, parts)
            weights = call.weights + turn * call.scratch_step + part * call.part_step
            _sum_rows(call, first_head + turn, part, weights)


LOOP = Loop(
    _scores,
    [
        *("cache", "num_kv_heads", "block_size", "itemsize", "blocks"),
        *("query", "row_step", "head_step", "code", "num_rows", "num_heads"),
        *("head_size", "group", "num_tokens", "scores", "part_step"),
        *("scratch", "weights", "scratch_step"),
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
    part_size = PART * (num_rows + 1) + 2 * num_rows
    query_size = (num_rows + 1) * head_size
    size = query_size + parts * part_size
    scratch = torch.empty(torch.get_num_threads(), size, dtype=torch.float32)
    LOOP.run(
        ELEMENTS[kv_cache.dtype],
        kv_cache.data_ptr(),
        num_kv_heads,
        block_elements // head_size,
        kv_cache.element_size(),
        blocks.data_ptr(),
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
        4 * part_size,
        scratch.data_ptr(),
        scratch.data_ptr() + 4 * query_size,
        4 * size,
        scale,
        soft_cap,
    )
    return scores
