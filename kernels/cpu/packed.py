"""Products with rows packed in pairs, as vLLM's AMX kernel has them.

A block's keys are `[block_size / 16, head_size / 2, 16, 2]`: pairs of elements, of 16
slots beside each other. Its values are `[head_size / 16, block_size / 2, 16, 2]`: pairs
of slots, of 16 elements beside each other. Elements are bfloat16 or `vectors.FP8`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from vllm_avl.kernels.cpu.pairs import (
    BFLOATS,
    LINE,
    PAIRED,
    PAIRS,
    add_query_pairs,
    add_weight_pairs,
    store_products,
)
from vllm_avl.kernels.cpu.threads import compiled, copy_element, read, write
from vllm_avl.kernels.cpu.tiles import (
    AHEAD,
    PART,
    TILE,
    build_sums,
    clear_sums,
    for_rows,
    load_sums,
    rows_at_once,
    store_sums,
)
from vllm_avl.kernels.cpu.vectors import (
    LANES,
    bfloats_from,
    instruction,
    offset,
    pointer_at,
    prefetch_at,
    splat,
    store,
)

ENTRY = 3
"""Numbers of a listed pair of values: its address, bytes from a row's first weight to
the pair's, and the bits of its elements that are read."""
VECTOR = 32
"""Elements of 16 pairs."""

_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_WORD, 16)


def _vector_bytes(element: Any) -> Any:
    return _LONG(VECTOR * element.bitwidth // 8)


def _all_lanes(builder: Any, word: Any) -> Any:
    empty = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(empty, word, _WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(_WORDS, [0] * 16))


@instruction(types.void, None, *[types.int64] * 5, types.float32, *[types.int64] * 2)
def _dot_packed(
    builder: Any,
    element: Any,
    keys: Any,
    head_size: Any,
    query: Any,
    row_step: Any,
    num_rows: Any,
    scale: Any,
    logits: Any,
    ahead: Any,
) -> None:
    """As `tiles.dot_tile`, of rows that lie `row_step` bytes apart, times `scale`."""
    if not PAIRS or element not in PAIRED:
        return
    num_pairs, num_bytes = builder.udiv(head_size, _LONG(2)), _vector_bytes(element)
    to_next = builder.mul(num_pairs, num_bytes)

    def build(rows: int) -> None:
        sums = build_sums(builder, rows, TILE // LANES)
        clear_sums(builder, sums)
        with cgutils.for_range(builder, num_pairs) as loop:
            step = builder.mul(loop.index, num_bytes)
            pairs = []
            for slots in range(TILE // LANES):
                at = builder.add(step, builder.mul(to_next, _LONG(slots)))
                prefetch_at(builder, builder.add(ahead, at))
                at = builder.add(keys, at)
                found = bfloats_from(builder, at, element, VECTOR)
                pairs.append(builder.bitcast(found, BFLOATS))
            at = builder.add(query, builder.mul(loop.index, _LONG(4)))
            add_query_pairs(builder, sums, at, row_step, pairs)
        store_products(builder, sums, scale, logits)

    for_rows(builder, num_rows, build)


@instruction(types.void, None, *[types.int64] * 8)
def _add_packed(
    builder: Any,
    element: Any,
    picked: Any,
    num_pairs: Any,
    column: Any,
    group_step: Any,
    weights: Any,
    num_rows: Any,
    sums: Any,
    sum_step: Any,
) -> None:
    """As `tiles.add_tile`, of `TILE` columns of listed pairs by packed weights.

    `group_step` are the bytes from 16 elements of a half block to the next 16.
    """
    if not PAIRS or element not in PAIRED:
        return
    groups = builder.udiv(column, _LONG(LANES))
    at_column = builder.mul(groups, group_step)
    outputs = builder.add(sums, builder.mul(column, _LONG(4)))

    def entry(index: Any, number: int) -> Any:
        at = builder.add(picked, builder.mul(index, _LONG(8 * ENTRY)))
        at = offset(builder, at, 8 * number)
        return builder.load(pointer_at(builder, at, _LONG))

    def vectors_at(index: Any) -> list[Any]:
        first = builder.add(entry(index, 0), at_column)
        return [first, builder.add(first, group_step)]

    def build(rows: int) -> None:
        sums = build_sums(builder, rows, TILE // LANES)
        load_sums(builder, sums, outputs, sum_step)
        with cgutils.for_range(builder, num_pairs) as loop:
            for at in vectors_at(builder.add(loop.index, _LONG(AHEAD // 2))):
                prefetch_at(builder, at)
            bits = builder.trunc(entry(loop.index, 2), _WORD)
            bits = _all_lanes(builder, bits)
            # Of a pair that is read by half, the other may be anything.
            pairs = []
            for at in vectors_at(loop.index):
                found = bfloats_from(builder, at, element, VECTOR)
                found = builder.and_(builder.bitcast(found, _WORDS), bits)
                pairs.append(builder.bitcast(found, BFLOATS))
            at = builder.add(weights, entry(loop.index, 1))
            add_weight_pairs(builder, sums, at, pairs)
        store_sums(builder, sums, outputs, sum_step)

    for_rows(builder, num_rows, build)


@compiled
def weigh_packed(
    element: Any,
    keys: int,
    size: int,
    query: int,
    row_step: int,
    rows: int,
    scale: float,
    logits: int,
    ahead: int,
) -> None:
    """As `pairs.weigh_pairs`, of `TILE` packed keys."""
    row = 0
    while row < rows:
        at_once, at = rows_at_once(rows - row), query + row * row_step
        to = logits + 4 * row * PART
        _dot_packed(element, keys, size, at, row_step, at_once, scale, to, ahead)
        row += at_once


@compiled
def list_pair(picked: int, count: int, values: int, number: int, is_read: int) -> int:
    """List a pair of values if one of them is read; return the new `count`.

    Args:
        picked: address of int64 [more than count, ENTRY].
        values: address of the pair's first elements.
        number: of its first slot among the weights, even.
        is_read: 1 for the first, 2 for the second, 3 for both.
    """
    bits = (is_read & 1) * 0xFFFF + (is_read >> 1) * 0xFFFF0000
    write(picked, types.int64, ENTRY * count, values)
    write(picked, types.int64, ENTRY * count + 1, 2 * number)
    write(picked, types.int64, ENTRY * count + 2, bits)
    return count + (is_read > 0)


@compiled
def end_pairs(picked: int, count: int) -> None:
    """Write behind `count` listed pairs what may be fetched ahead of need."""
    last = read(picked, types.int64, ENTRY * max(count - 1, 0))
    for index in range(count, count + AHEAD // 2):
        write(picked, types.int64, ENTRY * index, last)


@compiled
def add_packed_values(
    element: Any,
    picked: int,
    count: int,
    size: int,
    group_step: int,
    weights: int,
    rows: int,
    sums: int,
) -> None:
    """Write the sums of `count` listed pairs, weighted: fp32 [rows, size].

    Args:
        size: a multiple of `TILE`.
        group_step: bytes from 16 elements of a half block to the next 16.
        weights: as `pairs.pack_weights` writes them, a slot's at its number.
    """
    for at in range(0, 4 * rows * size, 4 * LANES):
        store(sums + at, splat(np.float32(0)))
    for first in range(0, count, TILE // 2):
        num_pairs = min(count - first, TILE // 2)
        for column in range(0, size, TILE):
            row = 0
            while row < rows:
                at_once = rows_at_once(rows - row)
                _add_packed(
                    element,
                    picked + 8 * ENTRY * first,
                    num_pairs,
                    column,
                    group_step,
                    weights + row * LINE,
                    at_once,
                    sums + 4 * row * size,
                    4 * size,
                )
                row += at_once


@compiled
def key_place(slot: int, size: int) -> int:
    """Where a slot's first element lies in a half block of keys, in elements."""
    return slot // LANES * LANES * size + slot % LANES * 2


@compiled
def value_place(slot: int) -> int:
    """The same, of values."""
    return slot // 2 * 2 * LANES + slot % 2


@instruction(types.void, *[types.int64] * 4, None)
def _copy_pair(
    builder: Any, source: Any, old: Any, target: Any, new: Any, element: Any
) -> None:
    """Copy two elements from one index, which is even, to another."""
    pair, size = ir.IntType(2 * element.bitwidth), _LONG(element.bitwidth // 8)
    at = builder.add(source, builder.mul(old, size))
    to = builder.add(target, builder.mul(new, size))
    found = builder.load(pointer_at(builder, at, pair), align=1)
    builder.store(found, pointer_at(builder, to, pair), align=1)


@compiled
def copy_key(
    source: int,
    old: int,
    old_step: int,
    target: int,
    new: int,
    new_step: int,
    size: int,
    element: Any,
) -> None:
    """Copy a key, a pair of elements every `step` elements."""
    for pair in range(size // 2):
        at, to = old + pair * old_step, new + pair * new_step
        _copy_pair(source, at, target, to, element)


@compiled
def copy_value(
    source: int,
    old: int,
    old_steps: tuple,
    target: int,
    new: int,
    new_steps: tuple,
    size: int,
    element: Any,
) -> None:
    """Copy a value: elements and groups of 16 elements are `steps` elements apart."""
    for group in range(size // LANES):
        at, to = old + group * old_steps[1], new + group * new_steps[1]
        for index in range(LANES):
            copy_element(
                source,
                at + index * old_steps[0],
                target,
                to + index * new_steps[0],
                element,
            )


def _words_at(builder: Any, address: Any) -> Any:
    return builder.load(pointer_at(builder, address, _WORDS), align=2)


@instruction(types.void, *[types.int64] * 5)
def _merge(
    builder: Any, one: Any, shift: Any, other: Any, other_shift: Any, target: Any
) -> None:
    """Write 16 pairs of bfloat16: of each at `one` and each at `other` a number.

    Args:
        builder: of instructions.
        one: address of 16 pairs, of which the second are taken if `shift` is 16, the
            first if it is 0.
        shift: see `one`.
        other: the same, by `other_shift`.
        other_shift: see `other`.
        target: address.
    """
    if LANES != 16:
        return
    shift, other_shift = (
        _all_lanes(builder, builder.trunc(number, _WORD))
        for number in (shift, other_shift)
    )
    low = builder.lshr(_words_at(builder, one), shift)
    low = builder.and_(low, ir.Constant(_WORDS, [0xFFFF] * 16))
    high = builder.lshr(_words_at(builder, other), other_shift)
    high = builder.shl(high, ir.Constant(_WORDS, [16] * 16))
    to = pointer_at(builder, target, _WORDS)
    builder.store(builder.or_(low, high), to, align=2)


@compiled
def copy_value_pair(
    cache: int, one: int, other: int, to: int, group_step: int, size: int
) -> None:
    """Copy two values of bfloat16 to a pair of slots; all numbers are of elements."""
    line, second, target = cache + one // 2 * 4, cache + other // 2 * 4, cache + 2 * to
    for _ in range(size // LANES):
        _merge(line, one % 2 * 16, second, other % 2 * 16, target)
        line += 2 * group_step
        second += 2 * group_step
        target += 2 * group_step
