"""Products of 16 rows with packed keys and values, by a processor's matrix registers.

For the rows that score, of which there are enough to fill them. Elements are bfloat16,
sums fp32. Head sizes are multiples of `TILE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from vllm_avl.kernels.cpu.pairs import LINE, PAIRS, call
from vllm_avl.kernels.cpu.softmax import STEP
from vllm_avl.kernels.cpu.threads import compiled, copy_element, read, write
from vllm_avl.kernels.cpu.tiles import PART, TILE
from vllm_avl.kernels.cpu.vectors import (
    LANES,
    instruction,
    load,
    multiply,
    offset,
    pointer_at,
    splat,
    store,
)


def _usable() -> bool:
    features = llvm.get_host_cpu_features()
    has_it = all(features.get(name) for name in ("amx-tile", "amx-bf16"))
    # Linux lets a process use them that has asked.
    return PAIRS and has_it and bool(torch.cpu._init_amx())


AMX = _usable()
"""Whether the processor has what this needs."""
MATRIX_ROWS = 16
"""Rows of a register."""
VECTOR = 64
"""Bytes of such a row."""
MATRIX = MATRIX_ROWS * VECTOR
"""Bytes of a register."""


def _all_full() -> np.ndarray:
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = VECTOR
    config[48:56] = MATRIX_ROWS
    return config


CONFIG = _all_full()
"""The processor's configuration of eight full registers."""

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)


def _load(builder: Any, register: int, address: Any, step: Any) -> None:
    at = pointer_at(builder, address, _BYTE)
    _call(builder, "tileloadd64", _BYTE(register), at, step)


def _store(builder: Any, register: int, address: Any, step: Any) -> None:
    at = pointer_at(builder, address, _BYTE)
    _call(builder, "tilestored64", _BYTE(register), at, step)


def _multiply_add(builder: Any, sums: int, one: int, other: int) -> None:
    _call(builder, "tdpbf16ps", _BYTE(sums), _BYTE(one), _BYTE(other))


def _for_rows(builder: Any, num_matrices: Any, build: Callable[[int], None]) -> None:
    """Build for 16 rows and for 32: a register for each 16."""
    two = builder.icmp_signed("==", num_matrices, _LONG(2))
    with builder.if_else(two) as (both, one):
        with both:
            build(2)
        with one:
            build(1)


def _multiply_all(builder: Any, rows: int) -> None:
    """Registers 0 to 3 are sums, 4 and 5 rows, 6 and 7 what they meet."""
    for row in range(rows):
        for column in range(2):
            _multiply_add(builder, 2 * row + column, 4 + row, 6 + column)


@instruction(types.void, types.int64)
def _configure(builder: Any, config: Any) -> None:
    if AMX:
        _call(builder, "ldtilecfg", pointer_at(builder, config, _BYTE))


@instruction(types.void)
def _release(builder: Any) -> None:
    if AMX:
        _call(builder, "tilerelease")


@instruction(types.void, *[types.int64] * 5)
def _dot(
    builder: Any,
    queries: Any,
    num_matrices: Any,
    keys: Any,
    head_size: Any,
    logits: Any,
) -> None:
    """Write the products of 16 or 32 rows with `TILE` keys.

    Args:
        builder: of instructions.
        queries: address of bfloat16 [rows, head_size].
        num_matrices: 1 or 2.
        keys: address.
        head_size: of keys and queries.
        logits: address of fp32 [rows, TILE], rows `PART` numbers apart.
    """
    if not AMX:
        return
    row_step = builder.mul(head_size, _LONG(2))
    to_rows = builder.mul(row_step, _LONG(MATRIX_ROWS))
    to_next = builder.mul(head_size, _LONG(2 * LANES))

    def build(rows: int) -> None:
        for register in range(2 * rows):
            _call(builder, "tilezero", _BYTE(register))
        with cgutils.for_range(builder, builder.udiv(head_size, _LONG(32))) as loop:
            at = builder.add(queries, builder.mul(loop.index, _LONG(VECTOR)))
            for row in range(rows):
                of_row = builder.add(at, builder.mul(to_rows, _LONG(row)))
                _load(builder, 4 + row, of_row, row_step)
            at = builder.add(keys, builder.mul(loop.index, _LONG(MATRIX)))
            for slots in range(2):
                of_slots = builder.add(at, builder.mul(to_next, _LONG(slots)))
                _load(builder, 6 + slots, of_slots, _LONG(VECTOR))
            _multiply_all(builder, rows)
        for row in range(rows):
            for slots in range(2):
                at = 4 * (row * MATRIX_ROWS * PART + slots * LANES)
                at = offset(builder, logits, at)
                _store(builder, 2 * row + slots, at, _LONG(4 * PART))

    _for_rows(builder, num_matrices, build)


@instruction(types.void, *[types.int64] * 8)
def _add(
    builder: Any,
    weights: Any,
    num_matrices: Any,
    tiles: Any,
    num_tiles: Any,
    column: Any,
    group_step: Any,
    sums: Any,
    sum_step: Any,
) -> None:
    """Add `TILE` columns of values, weighted, to the sums of 16 or 32 rows.

    Args:
        builder: of instructions.
        weights: address of bfloat16 [rows, PART], rows `LINE` bytes apart.
        num_matrices: 1 or 2.
        tiles: address of int64 [num_tiles], where the values of `TILE` slots lie.
        num_tiles: how many.
        column: the first.
        group_step: bytes from 16 elements of a tile to the next 16.
        sums: address of fp32 [rows, head_size], rows `sum_step` bytes apart.
        sum_step: see `sums`.
    """
    if not AMX:
        return
    groups = builder.udiv(column, _LONG(LANES))
    at_column = builder.mul(groups, group_step)
    outputs = builder.add(sums, builder.mul(column, _LONG(4)))
    to_rows = builder.mul(sum_step, _LONG(MATRIX_ROWS))

    def sums_at(row: int, columns: int) -> Any:
        at = builder.add(outputs, builder.mul(to_rows, _LONG(row)))
        return offset(builder, at, 4 * columns * LANES)

    def build(rows: int) -> None:
        places = [(2 * r + c, sums_at(r, c)) for r in range(rows) for c in range(2)]
        for register, at in places:
            _load(builder, register, at, sum_step)
        with cgutils.for_range(builder, num_tiles) as loop:
            at = builder.add(weights, builder.mul(loop.index, _LONG(VECTOR)))
            for row in range(rows):
                of_row = offset(builder, at, row * MATRIX_ROWS * LINE)
                _load(builder, 4 + row, of_row, _LONG(LINE))
            at = builder.add(tiles, builder.mul(loop.index, _LONG(8)))
            at = builder.load(pointer_at(builder, at, _LONG))
            at = builder.add(at, at_column)
            _load(builder, 6, at, _LONG(VECTOR))
            _load(builder, 7, builder.add(at, group_step), _LONG(VECTOR))
            _multiply_all(builder, rows)
        for register, at in places:
            _store(builder, register, at, sum_step)

    _for_rows(builder, num_matrices, build)


begin_matrices = compiled(lambda config: _configure(config))
"""Make a thread's registers ready, with `CONFIG`'s address."""
end_matrices = compiled(lambda: _release())
"""Give them up."""


@compiled
def lay_rows(query: int, row_step: int, rows: int, size: int, to: int) -> None:
    """Write rows of bfloat16 one behind the other, and rows of 0 up to whole 16."""
    for row in range((rows + MATRIX_ROWS - 1) // MATRIX_ROWS * MATRIX_ROWS):
        line = to + 2 * row * size
        for index in range(size // 2):
            if row < rows:
                copy_element(query + row * row_step, index, line, index, np.uint32(0))
            else:
                write(line, types.uint32, index, 0)


@compiled
def weigh_matrices(
    keys: int, size: int, queries: int, rows: int, scale: float, logits: int
) -> None:
    """As `packed.weigh_packed`, of rows that `lay_rows` has written.

    Logits of whole 16 rows are written, of which only `rows` are scaled.
    """
    for row in range(0, rows, 2 * MATRIX_ROWS):
        num_matrices = 2 if rows - row > MATRIX_ROWS else 1
        at, to = queries + 2 * row * size, logits + 4 * row * PART
        _dot(at, num_matrices, keys, size, to)
    factor = splat(scale)
    for row in range(rows):
        line = logits + 4 * row * PART
        for at in range(line, line + 4 * TILE, STEP):
            store(at, multiply(load(at), factor))


@compiled
def add_matrices(
    tiles: int,
    num_tiles: int,
    size: int,
    group_step: int,
    weights: int,
    rows: int,
    sums: int,
) -> None:
    """Add the values of some tiles, weighted, to fp32 [rows up to whole 16, size].

    Args:
        tiles: address of int64 [num_tiles], where their values lie.
        group_step: bytes from 16 elements of a tile to the next 16.
        weights: address of bfloat16 [rows, TILE * num_tiles], `LINE` bytes apart.
    """
    for row in range(0, rows, 2 * MATRIX_ROWS):
        num_matrices = 2 if rows - row > MATRIX_ROWS else 1
        of_rows, to = weights + row * LINE, sums + 4 * row * size
        for column in range(0, size, TILE):
            _add(
                of_rows,
                num_matrices,
                tiles,
                num_tiles,
                column,
                group_step,
                to,
                4 * size,
            )


@compiled
def copy_first_values(
    values: int, count: int, size: int, group_step: int, to: int
) -> None:
    """Copy the first `count` of a tile's values, and 0 for the others.

    Their groups of 16 elements are `MATRIX` bytes apart then.
    """
    for group in range(size // LANES):
        line, target = values + group * group_step, to + group * MATRIX
        for index in range(TILE * LANES):
            slot = index // (2 * LANES) * 2 + index % 2
            value = read(line, types.uint16, index) if slot < count else 0
            write(target, types.uint16, index, value)
