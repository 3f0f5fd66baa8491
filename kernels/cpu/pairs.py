"""Products of bfloat16 in pairs, for processors with an instruction for them.

What is cached as fp8 is bfloat16 in a register, and as exact.

The instruction multiplies two pairs and adds both products to an fp32 sum: half as many
as widened elements need. Keys and values of two lines are interleaved into pairs; a
query row has its own in memory already. Products are exact, sums are fp32, and weights
of values are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from vllm_avl.kernels.cpu.compress import COMPRESSED, WINDOW, compress
from vllm_avl.kernels.cpu.threads import compiled, write
from vllm_avl.kernels.cpu.tiles import (
    AHEAD,
    PART,
    TILE,
    build_sums,
    clear_sums,
    for_rows,
    for_rows_and_columns,
    load_sums,
    prefetch_tile,
    rows_at_once,
    store_sums,
)
from vllm_avl.kernels.cpu.vectors import (
    FLOATS,
    FP8,
    LANES,
    bfloats_from,
    broadcast,
    instruction,
    narrow_to,
    offset,
    pointer_at,
    splat,
    store,
    widened_from,
)

PAIRS = (
    LANES == 16
    and types.uint16 in COMPRESSED
    and bool(llvm.get_host_cpu_features().get("avx512bf16"))
)
"""Whether the processor has what this needs."""
PAIRED = types.uint16, types.uint8
"""Elements whose products are made in pairs: bfloat16 and `FP8`."""
LINE = 2 * (PART + WINDOW)
"""Bytes between two rows of packed weights."""


class _BFloat(ir.Type):
    """LLVM's type of that name, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)
_SHORT, _WORD, _LONG = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Call an instruction of the processor by LLVM's name for it."""
    kinds = [argument.type for argument in arguments]
    kind = ir.FunctionType(result, kinds)
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def add_pairs(builder: Any, places: Any, factor: Any, pairs: Any) -> None:
    """Add a row's products to its sums."""
    for place, vector in zip(places, pairs, strict=True):
        arguments = [builder.load(place), factor, vector]
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        builder.store(call(builder, name, FLOATS, arguments), place)


def pair_at(builder: Any, address: Any) -> Any:
    """The pair at an address, in every place of a vector."""
    bits = builder.load(pointer_at(builder, address, ir.FloatType()), align=2)
    return builder.bitcast(broadcast(builder, bits), BFLOATS)


def add_query_pairs(builder: Any, sums: Any, at: Any, step: Any, pairs: Any) -> None:
    """Add to each row its products, with a pair from `at` on every `step` bytes."""
    for row, places in enumerate(sums):
        of_row = builder.add(at, builder.mul(step, _LONG(row)))
        add_pairs(builder, places, pair_at(builder, of_row), pairs)


def add_weight_pairs(builder: Any, sums: Any, at: Any, pairs: Any) -> None:
    """The same, of packed weights."""
    for row, places in enumerate(sums):
        factor = pair_at(builder, offset(builder, at, row * LINE))
        add_pairs(builder, places, factor, pairs)


def store_products(builder: Any, sums: Any, scale: Any, logits: Any) -> None:
    """Write rows of sums, times `scale`, `PART` numbers apart."""
    factor = broadcast(builder, scale)
    for row, places in enumerate(sums):
        for index, place in enumerate(places):
            at = offset(builder, logits, 4 * (row * PART + index * LANES))
            product = builder.fmul(builder.load(place), factor)
            narrow_to(builder, at, product, types.float32)


def is_paired(query: torch.dtype, cached: torch.dtype) -> bool:
    """Whether products of two dtypes are made in pairs."""
    return PAIRS and query == torch.bfloat16 and cached in (torch.bfloat16, FP8)


def _interleaved(
    builder: Any, one: Any, other: Any, element: Any, vectors: int
) -> list[Any]:
    """Pairs of the elements at two addresses."""
    width = LANES * vectors
    lines = [bfloats_from(builder, line, element, width) for line in (one, other)]
    pairs = []
    for first in range(0, width, LANES):
        order = [(n, width + n) for n in range(first, first + LANES)]
        mask = [_WORD(place) for both in order for place in both]
        mask = ir.Constant(ir.VectorType(_WORD, 2 * LANES), mask)
        pairs.append(builder.bitcast(builder.shuffle_vector(*lines, mask), BFLOATS))
    return pairs


@instruction(types.void, None, *[types.int64] * 6, types.float32, *[types.int64] * 2)
def _dot_pairs(
    builder: Any,
    element: Any,
    keys: Any,
    key_step: Any,
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
    two = _LONG(2)

    def build(rows: int) -> None:
        sums = build_sums(builder, rows, TILE // LANES)
        clear_sums(builder, sums)
        with cgutils.for_range(builder, builder.udiv(head_size, two)) as loop:
            step = builder.mul(builder.mul(loop.index, two), key_step)
            one = builder.add(keys, step)
            other = builder.add(one, key_step)
            later = builder.add(ahead, step)
            prefetch_tile(builder, later, element)
            prefetch_tile(builder, builder.add(later, key_step), element)
            pairs = _interleaved(builder, one, other, element, TILE // LANES)
            at = builder.add(query, builder.mul(loop.index, _LONG(4)))
            add_query_pairs(builder, sums, at, row_step, pairs)
        store_products(builder, sums, scale, logits)

    for_rows(builder, num_rows, build)


@instruction(types.void, None, *[types.int64] * 8)
def _add_value_pairs(
    builder: Any,
    element: Any,
    picked: Any,
    num_pairs: Any,
    column: Any,
    num_columns: Any,
    weights: Any,
    num_rows: Any,
    sums: Any,
    sum_step: Any,
) -> None:
    """As `tiles.add_tile`, of pairs of values by packed weights."""
    if not PAIRS or element not in PAIRED:
        return
    at_column = builder.mul(column, _LONG(element.bitwidth // 8))
    outputs = builder.add(sums, builder.mul(column, _LONG(4)))

    def value(index: Any) -> Any:
        at = builder.add(picked, builder.mul(index, _LONG(16)))
        return builder.add(builder.load(pointer_at(builder, at, _LONG)), at_column)

    def build(rows: int, vectors: int) -> None:
        sums = build_sums(builder, rows, vectors)
        load_sums(builder, sums, outputs, sum_step)
        with cgutils.for_range(builder, num_pairs) as loop:
            first = builder.mul(loop.index, _LONG(2))
            second = builder.add(first, _LONG(1))
            for index in (first, second):
                later = builder.add(index, _LONG(AHEAD))
                prefetch_tile(builder, value(later), element)
            lines = value(first), value(second)
            pairs = _interleaved(builder, *lines, element, vectors)
            at = builder.add(weights, builder.mul(loop.index, _LONG(4)))
            add_weight_pairs(builder, sums, at, pairs)
        store_sums(builder, sums, outputs, sum_step)

    for_rows_and_columns(builder, num_rows, num_columns, build)


@instruction(types.void, types.int64, types.int64)
def _narrow(builder: Any, source: Any, target: Any) -> None:
    """Write `WINDOW` fp32 numbers as bfloat16, rounded to the nearest."""
    if not PAIRS:
        return
    low, high = (
        widened_from(builder, offset(builder, source, at), types.float32)
        for at in (0, 4 * LANES)
    )
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    both = call(builder, name, BFLOATS, [high, low])
    kind = ir.VectorType(_SHORT, 2 * LANES)
    both = builder.bitcast(both, kind)
    builder.store(both, pointer_at(builder, target, kind), align=2)


@instruction(types.int64, types.int64)
def _bits_at(builder: Any, marks: Any) -> Any:
    """A bit for each of `WINDOW` bytes from an address on: whether it is not 0."""
    kind = ir.VectorType(ir.IntType(8), WINDOW)
    marks = builder.load(pointer_at(builder, marks, kind), align=1)
    marked = builder.icmp_unsigned("!=", marks, ir.Constant(kind, [0] * WINDOW))
    return builder.zext(builder.bitcast(marked, ir.IntType(WINDOW)), _LONG)


@instruction(types.int64, types.int64)
def _number_of(builder: Any, bits: Any) -> Any:
    """How many bits are set."""
    return call(builder, "llvm.ctpop.i64", _LONG, [bits])


@compiled
def weigh_pairs(
    element: Any,
    keys: int,
    key_step: int,
    size: int,
    query: int,
    row_step: int,
    rows: int,
    scale: float,
    logits: int,
    ahead: int,
) -> None:
    """As `tiles.weigh_tile`, of query rows where they lie, times `scale`."""
    row = 0
    while row < rows:
        at_once, at = rows_at_once(rows - row), query + row * row_step
        to = logits + 4 * row * PART
        _dot_pairs(
            element, keys, key_step, size, at, row_step, at_once, scale, to, ahead
        )
        row += at_once


@compiled
def pack_weights(weights: int, rows: int, count: int, marks: int, to: int) -> None:
    """Write rows of weights as bfloat16, `LINE` bytes apart.

    Args:
        weights: address of fp32 [rows, PART].
        count: a multiple of `WINDOW`.
        marks: address of a byte for each weight, whether it is written; 0 for all.
        to: address.
    """
    end = 0
    for first in range(0, count, WINDOW):
        bits = _bits_at(marks + first) if marks else 0
        for row in range(rows):
            line = to + row * LINE
            _narrow(weights + 4 * (row * PART + first), line + 2 * first)
            if marks:
                compress(line + 2 * first, bits, line + 2 * end, np.uint16(0))
        end += _number_of(bits) if marks else WINDOW
    for row in range(rows):
        # Of an odd number of values, the last has another one beside it.
        write(to + row * LINE, types.uint16, end, 0)


@compiled
def add_value_pairs(
    element: Any, picked: int, count: int, size: int, weights: int, rows: int, sums: int
) -> None:
    """As `tiles.add_values`, by packed weights."""
    for at in range(0, 4 * rows * size, 4 * LANES):
        store(sums + at, splat(np.float32(0)))
    for first in range(0, count, TILE):
        num_pairs = (min(count - first, TILE) + 1) // 2
        for column in range(0, size, TILE):
            row = 0
            while row < rows:
                at_once = rows_at_once(rows - row)
                _add_value_pairs(
                    element,
                    picked + 16 * first,
                    num_pairs,
                    column,
                    min(size - column, TILE),
                    weights + 2 * first + row * LINE,
                    at_once,
                    sums + 4 * row * size,
                    4 * size,
                )
                row += at_once
