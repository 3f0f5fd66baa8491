"""Values of a part of a sequence, weighted for the rows that score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from vllm_avl.kernels.cpu.amx import MATRIX, add_matrices, copy_first_values
from vllm_avl.kernels.cpu.packed import (
    VECTOR,
    add_packed_values,
    end_pairs,
    list_pair,
)
from vllm_avl.kernels.cpu.pairs import LINE, add_value_pairs, pack_weights
from vllm_avl.kernels.cpu.softmax import STEP
from vllm_avl.kernels.cpu.threads import compiled, inlined, read, write
from vllm_avl.kernels.cpu.tiles import (
    PART,
    PICKED_BYTES,
    TILE,
    add_values,
    end_list,
)
from vllm_avl.kernels.cpu.vectors import LANES, splat, store


@compiled
def _block_at(call: Any, head: int, slot: int) -> int:
    """Address of the keys of a slot's block, in the KV head of a head."""
    half = call.block_size * call.head_size * call.itemsize
    block = np.int64(read(call.blocks, types.int32, slot // call.block_size))
    number = block * call.num_kv_heads + head // call.group
    return call.cache + number * 2 * half


@compiled
def keys_at(call: Any, head: int, slot: int) -> int:
    """Address of the keys of `TILE` slots from one on."""
    step = call.itemsize * (call.head_size if call.packed else 1)
    return _block_at(call, head, slot) + slot % call.block_size * step


@compiled
def _values_at(call: Any, head: int, slot: int) -> int:
    """Address of the values of `TILE` slots from one on."""
    size, rest = call.head_size, slot % call.block_size
    step = (rest // 2 * VECTOR if call.packed else rest * size) * call.itemsize
    half = call.block_size * size * call.itemsize
    return _block_at(call, head, slot) + half + step


@compiled
def _list_pairs(call: Any, head: int, first: int, count: int, picked: int) -> int:
    """List the packed values of a part; return how many pairs."""
    num_pairs = 0
    for index in range(0, count, TILE):
        values = _values_at(call, head, first + index)
        for number in range(index, min(index + TILE, count), 2):
            at = values + (number - index) // 2 * VECTOR * call.itemsize
            is_read = 3 if number + 1 < count else 1
            num_pairs = list_pair(picked, num_pairs, at, number, is_read)
    end_pairs(picked, num_pairs)
    return num_pairs


@compiled
def _add_matrices(
    call: Any, head: int, first: int, count: int, tiles: int, narrow: int, outputs: int
) -> None:
    """Write the sums of a part's values, by narrow weights."""
    size, rows = call.head_size, call.num_rows
    for at in range(0, 4 * call.lines * size, STEP):
        store(outputs + at, splat(np.float32(0)))
    step, num_tiles = call.block_size * MATRIX // TILE, count // TILE
    for tile in range(num_tiles):
        values = _values_at(call, head, first + tile * TILE)
        write(tiles, types.int64, tile, values)
    add_matrices(tiles, num_tiles, size, step, narrow, rows, outputs)
    whole = num_tiles * TILE
    if whole < count:
        # What lies behind the last slot may be anything.
        values = _values_at(call, head, first + whole)
        copied = narrow + call.lines * LINE
        copy_first_values(values, count - whole, size, step, copied)
        write(tiles, types.int64, 0, copied)
        add_matrices(tiles, 1, size, MATRIX, narrow + 2 * whole, rows, outputs)


@inlined
def weigh_values(call: Any, head: int, part: int, weights: int, picked: int) -> None:
    """Write a part's values, weighted, behind its weights."""
    first, size = part * PART, call.head_size
    count = min(first + PART, call.num_tokens) - first
    outputs = weights + call.part_step - 4 * call.lines * size
    rows, narrow = call.num_rows, picked + PICKED_BYTES
    num_slots = (count + TILE - 1) // TILE * TILE
    if call.config:
        pack_weights(weights, rows, num_slots, 0, narrow)
        _add_matrices(call, head, first, count, picked, narrow, outputs)
        return
    if call.packed:
        num_pairs = _list_pairs(call, head, first, count, picked)
        pack_weights(weights, rows, num_slots, 0, narrow)
        add_packed_values(
            call.element,
            picked,
            num_pairs,
            size,
            call.block_size * LANES * call.itemsize,
            narrow,
            rows,
            outputs,
        )
        return
    step = size * call.itemsize
    for index in range(0, count, TILE):
        value = _values_at(call, head, first + index)
        for number in range(index, min(index + TILE, count)):
            write(picked, types.int64, 2 * number, value)
            write(picked, types.int64, 2 * number + 1, 4 * number)
            value += step
    end_list(picked, count)
    if call.paired:
        pack_weights(weights, rows, num_slots, 0, narrow)
        add_value_pairs(call.element, picked, count, size, narrow, rows, outputs)
    else:
        add_values(call.element, picked, count, size, weights, rows, outputs)
