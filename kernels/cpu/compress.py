"""Copies and picks elements of a cache by one instruction each."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from vllm_avl.kernels.cpu.vectors import instruction, offset, pointer_at

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)

PIECE = 16
"""Bytes that `copy_piece` copies: every row has a whole number of them."""
WINDOW = 32
"""Slots that `compress` looks at: every block has a whole number of them."""
COMPRESSED = (
    {types.uint8: 32, types.uint16: 32, types.uint32: 16}
    if llvm.get_host_cpu_features().get("avx512vbmi2")
    else {}
)
"""How many elements of a kind one instruction compresses; none on older processors."""


@instruction(types.void, types.int64, types.int64)
def copy_piece(builder: Any, source: Any, target: Any) -> None:
    """Copy `PIECE` bytes from an address to an address."""
    source, target = (
        pointer_at(builder, address, ir.VectorType(_BYTE, PIECE))
        for address in (source, target)
    )
    builder.store(builder.load(source, align=1), target, align=1)


@instruction(types.void, types.int64, types.int64, types.int64, None)
def compress(builder: Any, source: Any, marks: Any, target: Any, element: Any) -> None:
    """Put those of `WINDOW` elements whose bit is set in `marks` one behind the other.

    As many elements as there are may be written, whatever the marks; nothing is for
    elements that are not in `COMPRESSED`.
    """
    lanes, bits = COMPRESSED.get(element), element.bitwidth
    if lanes is None:
        return
    kind = ir.VectorType(ir.IntType(bits), lanes)
    mask = ir.VectorType(ir.IntType(1), lanes)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind, kind, mask]),
        f"llvm.x86.avx512.mask.compress.v{lanes}i{bits}",
    )
    for first in range(0, WINDOW, lanes):
        at = offset(builder, source, first * bits // 8)
        elements = builder.load(pointer_at(builder, at, kind), align=1)
        part = builder.trunc(builder.lshr(marks, _LONG(first)), ir.IntType(lanes))
        marked = builder.bitcast(part, mask)
        empty = ir.Constant(kind, None)
        found = builder.call(function, [elements, empty, marked])
        builder.store(found, pointer_at(builder, target, kind), align=1)
        counter = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.IntType(lanes), [ir.IntType(lanes)]),
            f"llvm.ctpop.i{lanes}",
        )
        number = builder.zext(builder.call(counter, [part]), _LONG)
        target = builder.add(target, builder.mul(number, _LONG(bits // 8)))
