"""Attention of decode rows to selected keys of their sequences.

An item is a part of a row, of `PART` slots, and a KV head. Threads take items as they
come free. Each item leaves an output and what it is normalised by, and the thread
that ends a row's last item puts them together: a row's output does not depend on
which rows are beside it, nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.decode_rows import DecodeRows
from vllm_avl.kernels.cpu.listed_slots import TILES_BYTES, list_part, move_lists
from vllm_avl.kernels.cpu.packed import (
    add_packed_values,
    weigh_packed,
)
from vllm_avl.kernels.cpu.pairs import (
    add_value_pairs,
    is_paired,
    pack_weights,
    weigh_pairs,
)
from vllm_avl.kernels.cpu.queries import lay_queries
from vllm_avl.kernels.cpu.softmax import STEP, cap, exponentiate, normalise
from vllm_avl.kernels.cpu.threads import (
    Loop,
    compiled,
    count_up,
    inlined,
    read,
    thread_index,
    write,
)
from vllm_avl.kernels.cpu.tiles import (
    PART,
    PICKED_BYTES,
    TILE,
    add_values,
    weigh_tile,
)
from vllm_avl.kernels.cpu.vectors import (
    CODES,
    ELEMENTS,
    LANES,
    keep_marked,
    load,
    multiply,
    multiply_add,
    splat,
    store,
    store_as,
)


@inlined
def _weigh(
    call: Any, queries: int, lists: int, num_tiles: int, weights: int, norms: int
) -> None:
    """Weights of the listed tiles' slots, 0 where a slot is not read."""
    tiles = lists + PICKED_BYTES
    marks = tiles + TILES_BYTES
    group, count = call.group, num_tiles * TILE
    step, size = call.block_size * call.itemsize, call.head_size
    for tile in range(num_tiles):
        keys = read(tiles, types.int64, 2 * tile)
        ahead = read(tiles, types.int64, 2 * min(tile + 1, num_tiles - 1))
        to = weights + 4 * tile * TILE
        if call.packed:
            weigh_packed(
                call.element,
                keys,
                size,
                queries,
                call.query_head_step,
                group,
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
                call.query_head_step,
                group,
                call.scale,
                to,
                ahead,
            )
        else:
            weigh_tile(call.element, keys, step, size, queries, group, to, ahead)
    for row in range(group):
        logits = weights + 4 * row * PART
        if call.soft_cap > 0:
            cap(logits, count, call.soft_cap)
        for at in range(0, 4 * count, STEP):
            store(logits + at, keep_marked(marks + at // 4, load(logits + at)))
        exponentiate(logits, count, norms + 8 * row)


@compiled
def _probabilities_at(call: Any, row: int, head: int, member: int) -> int:
    """Address of the probabilities of a scored row, for a member of a head's group."""
    length = read(call.num_tokens, types.int64, row)
    line = (head * call.group + member) * length
    return read(call.probabilities, types.int64, row) + 4 * line


@compiled
def _keep_weights(
    call: Any, row: int, head: int, part: int, lists: int, tiles: int, weights: int
) -> None:
    """Write a part's weights, every slot's, to where the row's probabilities go."""
    end = min(PART, read(call.num_tokens, types.int64, row) - part * PART)
    for member in range(call.group):
        target = _probabilities_at(call, row, head, member) + 4 * part * PART
        for slot in range(end):
            write(target, types.float32, slot, 0)
        for tile in range(tiles):
            number = read(lists + PICKED_BYTES, types.int64, 2 * tile + 1)
            kept = weights + 4 * (member * PART + tile * TILE)
            for index in range(min(end - number * TILE, TILE)):
                weight = read(kept, types.float32, index)
                write(target, types.float32, number * TILE + index, weight)


@compiled
def _put_together(call: Any, row: int, head: int, item: int, parts: int) -> None:
    """Write a row's output for a KV head, of items from `item` on."""
    group, size = call.group, call.head_size
    outputs = call.outputs + 4 * item * group * size
    to = call.output + read(call.tokens, types.int64, row) * call.output_row_step
    to += head * group * call.output_head_step
    itemsize = 4 if call.code == 0 else 2
    for member in range(group):
        norms = call.norms + 8 * (item * group + member)
        normalise(norms, 8 * group, parts)
        for at in range(0, 4 * size, STEP):
            total = splat(np.float32(0))
            for part in range(parts):
                values = load(outputs + 4 * (part * group + member) * size + at)
                factor = read(norms, types.float32, 2 * group * part)
                total = multiply_add(values, splat(factor), total)
            total = multiply(total, splat(call.value_scale))
            store_as(to + at // 4 * itemsize, total, call.code)
        to += call.output_head_step
        if read(call.probabilities, types.int64, row):
            kept = _probabilities_at(call, row, head, member)
            for slot in range(read(call.num_tokens, types.int64, row)):
                factor = read(norms, types.float32, 2 * group * (slot // PART))
                weight = read(kept, types.float32, slot)
                write(kept, types.float32, slot, weight * factor)


@inlined
def _add_values(
    call: Any, lists: int, num_tiles: int, num_picked: int, weights: int, outputs: int
) -> None:
    """Write the sums of the listed values, weighted: fp32 [group, head_size]."""
    group, size = call.group, call.head_size
    if not call.paired:
        add_values(call.element, lists, num_picked, size, weights, group, outputs)
        return
    marks = lists + PICKED_BYTES + TILES_BYTES
    narrow = marks + PART
    if call.packed:
        pack_weights(weights, group, num_tiles * TILE, 0, narrow)
        add_packed_values(
            call.element,
            lists,
            num_picked,
            size,
            call.block_size * LANES * call.itemsize,
            narrow,
            group,
            outputs,
        )
    else:
        pack_weights(weights, group, num_tiles * TILE, marks, narrow)
        add_value_pairs(call.element, lists, num_picked, size, narrow, group, outputs)


def _attend(data: Any) -> None:
    call = carray(data, 1)[0]
    group, size, heads = call.group, call.head_size, call.num_kv_heads
    laid_at = call.scratch + np.int64(thread_index()) * call.scratch_step
    weights = laid_at + 4 * size * (group + 1)
    lists = weights + 4 * group * PART
    row, start, end, laid = -1, 0, 0, -1
    of_row, of_part, of_head, num_tiles, num_picked = -1, 0, 0, 0, 0
    head_bytes = 2 * call.block_size * size * call.itemsize
    item = count_up(call.taken)
    while item < call.num_items:
        while item >= end:
            row, start = row + 1, end
            end = read(call.ends, types.int64, row) * heads
        parts = (end - start) // heads
        # Heads of a part one after the other: most masks are the same for all.
        part, head = divmod(item - start, heads)
        place = start + head * parts + part
        step, code = call.query_head_step, call.code
        queries = call.query + head * group * step
        queries += read(call.tokens, types.int64, row) * call.query_row_step
        is_new = laid != row * heads + head
        laid = row * heads + head
        if not call.paired:
            if is_new:
                lay_queries(queries, step, code, call.scale, group, size, laid_at)
            queries = laid_at
        if (
            of_row == row
            and of_part == part
            and not read(call.mask_steps, types.int64, row)
        ):
            distance = (head - of_head) * head_bytes
            move_lists(call, lists, num_tiles, num_picked, distance)
        else:
            num_tiles, num_picked = list_part(call, row, head, part, lists)
        of_row, of_part, of_head = row, part, head
        norms = call.norms + 8 * place * group
        _weigh(call, queries, lists, num_tiles, weights, norms)
        if read(call.probabilities, types.int64, row):
            _keep_weights(call, row, head, part, lists, num_tiles, weights)
        outputs = call.outputs + 4 * place * group * size
        _add_values(call, lists, num_tiles, num_picked, weights, outputs)
        ended = call.ended + 8 * laid
        if count_up(ended) == parts - 1:
            write(ended, types.int64, 0, 0)
            _put_together(call, row, head, start + head * parts, parts)
        item = count_up(call.taken)


LOOP = Loop(
    _attend,
    [
        *("tokens", "blocks", "num_tokens", "num_masked", "mask_steps", "ends"),
        *("num_items", "taken", "ended", "norms", "outputs", "scratch", "scratch_step"),
        *("masks", "probabilities", "cache", "num_kv_heads", "block_size", "itemsize"),
        *("query", "query_row_step", "query_head_step", "group", "head_size"),
        *("output", "output_row_step", "output_head_step", "code", "paired"),
        "packed",
    ],
    ["scale", "soft_cap", "value_scale"],
)


def selected_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: DecodeRows,
    masks: np.ndarray,
    output: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    *,
    packed: bool = False,
) -> dict[int, torch.Tensor]:
    """Attend from decode rows to the selected keys of their sequences.

    Values that are not selected are not read, nor are `TILE` keys with none selected.

    Args:
        query: [num_step_tokens, num_heads, head_size].
        kv_cache: as this package describes.
        rows: which tokens attend, and to what.
        masks: [num_rows] addresses of the rows' masks in this layer, of one byte a
            slot, int64; 0 where a row has none.
        output: as query; written where rows has tokens.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.
        k_scale: what cached keys are multiplied by.
        v_scale: what cached values are multiplied by.
        packed: whether rows lie packed; queries are bfloat16 then.

    Returns:
        [num_heads, num_tokens] attention weights of each scored row, fp32, by the row's
        index in `rows`.
    """
    if len(rows.tokens) == 0:
        return {}
    _, num_heads, head_size = query.shape
    _, num_kv_heads, _, block_elements = kv_cache.shape
    group = num_heads // num_kv_heads
    assert kv_cache.is_contiguous()
    assert query.dtype == output.dtype
    assert query.stride(2) == output.stride(2) == 1
    assert masks.dtype == np.int64
    masks = np.ascontiguousarray(masks)
    paired = is_paired(query.dtype, kv_cache.dtype)
    assert paired or not packed
    addresses, probabilities = rows.probabilities(num_heads)
    itemsize = query.element_size()
    LOOP.run(
        ELEMENTS[kv_cache.dtype],
        *rows.addresses,
        *rows.scratch(num_kv_heads, group, head_size),
        masks.ctypes.data,
        addresses.ctypes.data,
        kv_cache.data_ptr(),
        num_kv_heads,
        block_elements // head_size,
        kv_cache.element_size(),
        query.data_ptr(),
        query.stride(0) * itemsize,
        query.stride(1) * itemsize,
        group,
        head_size,
        output.data_ptr(),
        output.stride(0) * itemsize,
        output.stride(1) * itemsize,
        CODES[query.dtype],
        paired,
        packed,
        scale * k_scale,
        soft_cap,
        v_scale,
    )
    return probabilities
