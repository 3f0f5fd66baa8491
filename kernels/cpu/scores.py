"""Attends from the last rows of a sequence, and scores its keys by what those pay.

A thread takes a query head: its logits, at most [num_rows, num_tokens], become weights
`PART` slots at a time; when the whole rows' sums are known, weights are summed over
rows and weighted values over parts. Heads that do not go into the threads evenly are
shared out by parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.amx import (
    AMX,
    CONFIG,
    MATRIX,
    MATRIX_ROWS,
    begin_matrices,
    end_matrices,
    lay_rows,
    weigh_matrices,
)
from vllm_avl.kernels.cpu.packed import weigh_packed
from vllm_avl.kernels.cpu.pairs import (
    LINE,
    is_paired,
    weigh_pairs,
)
from vllm_avl.kernels.cpu.queries import lay_queries
from vllm_avl.kernels.cpu.score_values import keys_at, weigh_values
from vllm_avl.kernels.cpu.softmax import STEP, cap, exponentiate, normalise
from vllm_avl.kernels.cpu.threads import (
    Loop,
    compiled,
    in_lines,
    inlined,
    num_threads,
    read,
    scratch_of,
    share,
    thread_index,
    wait_for_all,
    write,
)
from vllm_avl.kernels.cpu.tiles import (
    PART,
    PICKED_BYTES,
    TILE,
    weigh_tile,
)
from vllm_avl.kernels.cpu.vectors import (
    CODES,
    ELEMENTS,
    LANES,
    load,
    multiply,
    multiply_add,
    splat,
    store,
    store_as,
)


@inlined
def _part_weights(call: Any, head: int, part: int, queries: int, weights: int) -> None:
    """Weights of a part's slots, and what they are normalised by."""
    rows, size = call.num_rows, call.head_size
    first = part * PART
    num_tiles = (min(first + PART, call.num_tokens) - first + TILE - 1) // TILE
    ahead = keys_at(call, head, first)
    for tile in range(num_tiles):
        keys = ahead
        later = first + (tile + 1) * TILE
        if later < call.num_tokens:
            ahead = keys_at(call, head, later)
        step, to = call.block_size * call.itemsize, weights + 4 * tile * TILE
        if call.config:
            weigh_matrices(keys, size, queries, rows, call.scale, to)
        elif call.packed:
            weigh_packed(
                call.element,
                keys,
                size,
                queries,
                call.row_step,
                rows,
                call.scale,
                to,
                ahead,
            )
        elif call.paired:
            weigh_pairs(
                call.element,
                keys,
                step,
                size,
                queries,
                call.row_step,
                rows,
                call.scale,
                to,
                ahead,
            )
        else:
            weigh_tile(call.element, keys, step, size, queries, rows, to, ahead)
    count = num_tiles * TILE
    norms = weights + 4 * call.lines * PART
    for row in range(rows):
        at = weights + 4 * row * PART
        if call.soft_cap > 0:
            cap(at, count, call.soft_cap)
        for slot in range(max(call.num_tokens - rows + 1 + row - first, 0), count):
            write(at, types.float32, slot, -np.inf)
        exponentiate(at, count, norms + 8 * row)


@compiled
def _put_together(call: Any, head: int, row: int, parts: int, weights: int) -> None:
    """Write a row's output for a head."""
    lines, size = call.lines, call.head_size
    to = call.output + row * call.output_row_step + head * call.output_head_step
    norms = weights + 4 * PART * lines + 8 * row
    outputs = weights + call.part_step - 4 * (lines - row) * size
    itemsize = 4 if call.code == 0 else 2
    for at in range(0, 4 * size, STEP):
        total = splat(np.float32(0))
        for part in range(parts):
            factor = read(norms + part * call.part_step, types.float32, 0)
            values = load(outputs + part * call.part_step + at)
            total = multiply_add(values, splat(factor), total)
        total = multiply(total, splat(call.value_scale))
        store_as(to + at // 4 * itemsize, total, call.code)


@compiled
def _sum_rows(call: Any, head: int, part: int, weights: int) -> None:
    """Write a part's scores, of weights and what normalises them."""
    first = part * PART
    count = min(first + PART, call.num_tokens) - first
    norms = weights + 4 * PART * call.lines
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
    if call.config:
        lay_rows(query, call.row_step, rows, size, queries)
        begin_matrices(call.config)
    elif call.paired:
        queries = query
    else:
        lay_queries(query, call.row_step, call.code, call.scale, rows, size, queries)
    for part in range(first, end):
        at = weights + part * call.part_step
        _part_weights(call, head, part, queries, at)
        if call.output:
            picked = call.picked + np.int64(thread_index()) * call.scratch_step
            weigh_values(call, head, part, at, picked)
    if call.config:
        end_matrices()


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
            norms = call.weights + turn * call.scratch_step
            norms += 4 * PART * call.lines + 8 * row
            normalise(norms, call.part_step, parts)
            if call.output:
                weights = call.weights + turn * call.scratch_step
                _put_together(call, first_head + turn, row, parts, weights)
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
        *("scratch", "weights", "picked", "scratch_step"),
        *("output", "output_row_step", "output_head_step", "paired", "packed"),
        *("lines", "config"),
    ],
    ["scale", "soft_cap", "value_scale"],
)


def attention_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    output: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    *,
    packed: bool = False,
) -> torch.Tensor:
    """Sum attention probabilities over query rows, for every head and key.

    Probabilities are normalised over every key a row attends to (A-VL section
    "Vision attention"). Beside the scores, each thread holds the logits of one head,
    and an output for each `PART` keys.

    Args:
        query: [num_rows, num_heads, head_size], the last rows of the sequence.
        kv_cache: as this package describes.
        blocks: [cdiv(num_tokens, block_size) or more] block ids of the sequence, int32.
        num_tokens: keys in the sequence; row i attends to the first
            num_tokens - num_rows + 1 + i of them.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.
        output: as query, where to write what the rows attend to; None for nowhere.
        k_scale: what cached keys are multiplied by.
        v_scale: what cached values are multiplied by.
        packed: whether rows lie packed; queries are bfloat16 then.

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
    written = 0, 0, 0
    if output is not None:
        assert output.dtype == query.dtype
        assert output.stride(2) == 1
        steps = (step * output.element_size() for step in output.stride()[:2])
        written = output.data_ptr(), *steps
    parts = -(-num_tokens // PART)
    scores = torch.empty(num_heads, num_tokens, dtype=torch.float32)
    paired = is_paired(query.dtype, kv_cache.dtype)
    assert paired or not packed
    config, lines = 0, num_rows
    if AMX and packed and kv_cache.dtype == torch.bfloat16:
        config = CONFIG.ctypes.data
        lines = -(-num_rows // MATRIX_ROWS) * MATRIX_ROWS
    query_size = in_lines((lines + 1) * head_size)
    of_last = head_size * MATRIX // LANES
    picked_size = in_lines((PICKED_BYTES + paired * lines * LINE + of_last) // 4)
    part_size = PART * (lines + 1) + 2 * num_rows
    if output is not None:
        part_size += lines * head_size
    part_size = in_lines(part_size)
    size = query_size + picked_size + parts * part_size
    scratch = scratch_of(4 * size * torch.get_num_threads())
    picked = scratch + 4 * query_size
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
        scratch,
        picked + 4 * picked_size,
        picked,
        4 * size,
        *written,
        paired,
        packed,
        lines,
        config,
        scale * k_scale,
        soft_cap,
        v_scale,
    )
    return scores
