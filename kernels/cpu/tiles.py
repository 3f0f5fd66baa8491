"""The products attention is made of, with every sum in a register.

`weigh_tile` multiplies query rows with `TILE` keys that lie by column, `add_values`
adds values, listed by their addresses, by weights. Addresses are int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from vllm_avl.kernels.cpu.threads import compiled, read, write
from vllm_avl.kernels.cpu.vectors import (
    FLOATS,
    LANES,
    broadcast,
    constant,
    instruction,
    multiply_add_of,
    narrow_to,
    offset,
    pointer_at,
    prefetch_at,
    splat,
    store,
    vectors_from,
    widened_from,
)

TILE = 32
"""Keys of a product, and columns of values; every block size is a multiple."""
MOST_ROWS = 8 if LANES == 16 else 2
"""Rows of a product: with `TILE` sums each they leave registers for what they read."""
ROWS = [rows for rows in (1, 2, 4, 8) if rows <= MOST_ROWS]
"""Numbers of rows that products are compiled for."""
PART = 8 * TILE
"""Slots between two rows of weights."""
AHEAD = 24
"""How many values earlier than it is read a value is fetched."""
PICKED_BYTES = 16 * (PART + AHEAD)
"""Room for a part's values, listed."""
SUMMED = 16
"""Products summed by themselves, for a smaller error; head sizes are multiples."""
LINE = 64
"""Bytes of a processor's cache line."""

_LONG, _REAL = ir.IntType(64), ir.FloatType()


def for_rows(builder: Any, num_rows: Any, build: Callable[[int], None]) -> None:
    """Build a loop for each possible number of rows."""
    after = builder.append_basic_block("after")
    switch = builder.switch(num_rows, after)
    for rows in ROWS:
        block = builder.append_basic_block(f"rows_{rows}")
        switch.add_case(_LONG(rows), block)
        with builder.goto_block(block):
            build(rows)
            builder.branch(after)
    builder.position_at_end(after)


def for_rows_and_columns(
    builder: Any, num_rows: Any, num_columns: Any, build: Callable[[int, int], None]
) -> None:
    """The same, with vectors for `TILE` columns and for half as many."""
    whole = builder.icmp_signed("==", num_columns, _LONG(TILE))
    with builder.if_else(whole) as (wide, narrow):
        with wide:
            for_rows(builder, num_rows, lambda rows: build(rows, TILE // LANES))
        with narrow:
            half = TILE // LANES // 2
            for_rows(builder, num_rows, lambda rows: build(rows, half))


@compiled
def rows_at_once(left: int) -> int:
    """How many of the rows that are left the next product takes."""
    rows = MOST_ROWS
    while rows > left:
        rows //= 2
    return rows


def build_sums(builder: Any, rows: int, vectors: int) -> list[list[Any]]:
    """Places of sums, which LLVM turns into registers."""
    return [
        [cgutils.alloca_once(builder, FLOATS) for _ in range(vectors)]
        for _ in range(rows)
    ]


def _places(builder: Any, sums: Any, outputs: Any, step: Any) -> list[Any]:
    steps = [builder.mul(step, _LONG(row)) for row in range(len(sums))]
    lines = [builder.add(outputs, to_row) for to_row in steps]
    return [
        (place, offset(builder, line, 4 * index * LANES))
        for line, of_row in zip(lines, sums, strict=True)
        for index, place in enumerate(of_row)
    ]


def clear_sums(builder: Any, sums: Any) -> None:
    """Begin with 0."""
    for of_row in sums:
        for place in of_row:
            builder.store(constant(0.0), place)


def load_sums(builder: Any, sums: Any, outputs: Any, step: Any) -> None:
    """Begin with what has been written, a row's every `step` bytes."""
    for place, at in _places(builder, sums, outputs, step):
        builder.store(widened_from(builder, at, types.float32), place)


def store_sums(builder: Any, sums: Any, outputs: Any, step: Any) -> None:
    """Write sums back."""
    for place, at in _places(builder, sums, outputs, step):
        narrow_to(builder, at, builder.load(place), types.float32)


def _add_products(builder: Any, sums: Any, factors: Any, vectors: Any) -> None:
    for of_row, factor in zip(sums, factors, strict=True):
        for place, vector in zip(of_row, vectors, strict=True):
            added = builder.load(place)
            builder.store(multiply_add_of(builder, factor, vector, added), place)


def _factor(builder: Any, address: Any) -> Any:
    return broadcast(builder, builder.load(pointer_at(builder, address, _REAL)))


def prefetch_tile(builder: Any, address: Any, element: Any) -> None:
    """Fetch `TILE` elements."""
    for first in range(0, TILE * element.bitwidth // 8, LINE):
        prefetch_at(builder, offset(builder, address, first))


@instruction(types.void, None, *[types.int64] * 8)
def dot_tile(
    builder: Any,
    element: Any,
    keys: Any,
    key_step: Any,
    head_size: Any,
    queries: Any,
    query_step: Any,
    num_rows: Any,
    logits: Any,
    ahead: Any,
) -> None:
    """Write the products of some queries with `TILE` keys.

    Args:
        builder: of instructions.
        element: any value of the cache's element type.
        keys: address of the first column, `key_step` bytes before the next.
        key_step: see `keys`.
        head_size: columns.
        queries: address of fp32 [head_size, rows], lines `query_step` bytes apart.
        query_step: see `queries`.
        num_rows: one of `ROWS`.
        logits: address of fp32 [rows, TILE], rows `PART` numbers apart.
        ahead: address of keys to fetch, of the same step.
    """
    vectors = TILE // LANES

    def build(rows: int) -> None:
        sums = build_sums(builder, rows, vectors)
        written = [
            (place, offset(builder, logits, 4 * (row * PART + index * LANES)))
            for row in range(rows)
            for index, place in enumerate(sums[row])
        ]
        for _, at in written:
            narrow_to(builder, at, constant(0.0), types.float32)
        parts = builder.udiv(head_size, _LONG(SUMMED))
        with cgutils.for_range(builder, parts) as part:
            first = builder.mul(part.index, _LONG(SUMMED))
            for place, _ in written:
                builder.store(constant(0.0), place)
            with cgutils.for_range(builder, _LONG(SUMMED)) as loop:
                build_products(rows, sums, builder.add(first, loop.index))
            for place, at in written:
                before = widened_from(builder, at, types.float32)
                total = builder.fadd(before, builder.load(place))
                narrow_to(builder, at, total, types.float32)

    def build_products(rows: int, sums: Any, index: Any) -> None:
        step = builder.mul(index, key_step)
        prefetch_tile(builder, builder.add(ahead, step), element)
        at = builder.add(keys, step)
        read = vectors_from(builder, at, element, vectors)
        at = builder.add(queries, builder.mul(index, query_step))
        factors = [
            _factor(builder, offset(builder, at, 4 * row)) for row in range(rows)
        ]
        _add_products(builder, sums, factors, read)

    for_rows(builder, num_rows, build)


@instruction(types.void, None, *[types.int64] * 8)
def add_tile(
    builder: Any,
    element: Any,
    picked: Any,
    num_picked: Any,
    column: Any,
    num_columns: Any,
    weights: Any,
    num_rows: Any,
    sums: Any,
    sum_step: Any,
) -> None:
    """Add `TILE` columns, or half as many, of picked values to some sums.

    Args:
        builder: of instructions.
        element: any value of the cache's element type.
        picked: address of int64 [num_picked + AHEAD, 2]: where a value lies, and bytes
            from its row's first weight to its own.
        num_picked: how many.
        column: the first.
        num_columns: `TILE`, or half of it.
        weights: address of fp32 [rows, PART].
        num_rows: one of `ROWS`.
        sums: address of fp32 [rows, head_size], rows `sum_step` bytes apart.
        sum_step: see `sums`.
    """
    at_column = builder.mul(column, _LONG(element.bitwidth // 8))
    outputs = builder.add(sums, builder.mul(column, _LONG(4)))

    def entry(index: Any, number: int) -> Any:
        at = builder.add(picked, builder.mul(index, _LONG(16)))
        return builder.load(pointer_at(builder, offset(builder, at, 8 * number), _LONG))

    def build(rows: int, vectors: int) -> None:
        sums = build_sums(builder, rows, vectors)
        load_sums(builder, sums, outputs, sum_step)
        with cgutils.for_range(builder, num_picked) as loop:
            later = entry(builder.add(loop.index, _LONG(AHEAD)), 0)
            prefetch_tile(builder, builder.add(later, at_column), element)
            at = builder.add(entry(loop.index, 0), at_column)
            read = vectors_from(builder, at, element, vectors)
            at = builder.add(weights, entry(loop.index, 1))
            factors = [
                _factor(builder, offset(builder, at, 4 * row * PART))
                for row in range(rows)
            ]
            _add_products(builder, sums, factors, read)
        store_sums(builder, sums, outputs, sum_step)

    for_rows_and_columns(builder, num_rows, num_columns, build)


@compiled
def weigh_tile(
    element: Any,
    keys: int,
    key_step: int,
    size: int,
    queries: int,
    rows: int,
    logits: int,
    ahead: int,
) -> None:
    """As `dot_tile`, for any number of rows; their queries are fp32 [size, rows]."""
    row = 0
    while row < rows:
        at_once, at = rows_at_once(rows - row), queries + 4 * row
        to = logits + 4 * row * PART
        dot_tile(element, keys, key_step, size, at, 4 * rows, at_once, to, ahead)
        row += at_once


@compiled
def end_list(picked: int, count: int) -> None:
    """Write behind `count` listed values what may be fetched ahead of need."""
    last = read(picked, types.int64, 2 * max(count - 1, 0))
    for index in range(count, count + AHEAD):
        write(picked, types.int64, 2 * index, last)


@compiled
def add_values(
    element: Any, picked: int, count: int, size: int, weights: int, rows: int, sums: int
) -> None:
    """Write the sums of `count` listed values, weighted: fp32 [rows, size]."""
    for at in range(0, 4 * rows * size, 4 * LANES):
        store(sums + at, splat(np.float32(0)))
    for first in range(0, count, TILE):
        for column in range(0, size, TILE):
            row = 0
            while row < rows:
                at_once = rows_at_once(rows - row)
                add_tile(
                    element,
                    picked + 16 * first,
                    min(count - first, TILE),
                    column,
                    min(size - column, TILE),
                    weights + 4 * row * PART,
                    at_once,
                    sums + 4 * row * size,
                    4 * size,
                )
                row += at_once
