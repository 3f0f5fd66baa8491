"""Vectors of fp32 as values in compiled loops, each operation one LLVM instruction.

Numba leaves it to LLVM to find vectors in scalar loops, which fails where elements are
widened from bfloat16 and where exp is called. Here they are vectors from the start.
Addresses are int64, in bytes. An element type of a cache is named by the Numba type
that has its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
"""Elements of a vector: two make a line of bfloat16 where registers have 512 bits."""
FP8 = torch.float8_e4m3fn
"""What caches of 8 bits hold; with a scale, which is not the loops' concern."""
_QUERIES = {
    torch.float32: types.float32,
    torch.bfloat16: types.uint16,
    torch.float16: types.int16,
}
ELEMENTS = dict(_QUERIES)
"""What compiled loops call an element of each dtype that a cache may have."""
if llvm.get_host_cpu_features().get("avx512bw"):
    # As vLLM's kernel: nothing else looks 128 values up at once.
    ELEMENTS[FP8] = types.uint8
CODES = {dtype: code for code, dtype in enumerate(_QUERIES)}
"""Numbers of dtypes of queries: only a run of a loop knows which it is."""

_FLOAT, _WORD, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)
FLOATS = ir.VectorType(_FLOAT, LANES)
WORDS = ir.VectorType(_WORD, LANES)
_SHORTS = ir.VectorType(_SHORT, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)


class _Vector(types.Type):
    """`LANES` numbers in fp32."""

    def __init__(self) -> None:
        super().__init__(name=f"Vector{LANES}")


VECTOR = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, FLOATS)


# What builds instructions.


def constant(value: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(FLOATS, [value] * LANES)


def every_word(value: int) -> ir.Constant:
    """The vector whose elements have all the bits of `value`."""
    return ir.Constant(WORDS, [value] * LANES)


def pointer_at(builder: Any, address: Any, element: Any) -> Any:
    """An address as a pointer to LLVM's type `element`."""
    return builder.inttoptr(address, element.as_pointer())


def offset(builder: Any, address: Any, num_bytes: int) -> Any:
    """An address some bytes further."""
    return builder.add(address, _LONG(num_bytes))


def multiply_add_of(builder: Any, one: Any, other: Any, added: Any) -> Any:
    """One times other plus added, fused where the processor can."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    name = f"llvm.fmuladd.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [one, other, added])


def broadcast(builder: Any, number: Any) -> Any:
    """A vector of one fp32 value."""
    empty = ir.Constant(FLOATS, ir.Undefined)
    single = builder.insert_element(empty, number, _WORD(0))
    return builder.shuffle_vector(single, empty, ir.Constant(WORDS, [0] * LANES))


def widened_from(builder: Any, address: Any, element: Any) -> Any:
    """`LANES` cache elements at an address, exactly as fp32."""
    return vectors_from(builder, address, element, 1)[0]


def vectors_from(builder: Any, address: Any, element: Any, count: int) -> list[Any]:
    """`count` vectors of cache elements from an address on, exactly as fp32."""
    if element == types.uint8:
        # Looked up at once: a table is as long for one vector as for two.
        shorts = bfloats_from(builder, address, element, count * LANES)
        return [_widened(builder, part) for part in _split(builder, shorts, count)]
    size = LANES * element.bitwidth // 8
    return [
        _vector_from(builder, offset(builder, address, index * size), element)
        for index in range(count)
    ]


def _vector_from(builder: Any, address: Any, element: Any) -> Any:
    if element == types.float32:
        return builder.load(pointer_at(builder, address, FLOATS), align=4)
    if element == types.int16:
        halves = builder.load(pointer_at(builder, address, _HALVES), align=2)
        return builder.fpext(halves, FLOATS)
    return _widened(builder, bfloats_from(builder, address, element, LANES))


def _widened(builder: Any, shorts: Any) -> Any:
    words = builder.shl(builder.zext(shorts, WORDS), every_word(16))
    return builder.bitcast(words, FLOATS)


def _split(builder: Any, vector: Any, count: int) -> list[Any]:
    """`count` equal parts of a vector."""
    size = vector.type.count // count
    masks = [
        ir.Constant(ir.VectorType(_WORD, size), list(range(first, first + size)))
        for first in range(0, vector.type.count, size)
    ]
    return [builder.shuffle_vector(vector, vector, mask) for mask in masks]


def bfloats_from(builder: Any, address: Any, element: Any, count: int) -> Any:
    """`count` elements of bfloat16 or `FP8` at an address, as bits of bfloat16."""
    shorts = ir.VectorType(_SHORT, count)
    if element == types.uint16:
        return builder.load(pointer_at(builder, address, shorts), align=2)
    kind = ir.VectorType(_BYTE, count)
    bytes_ = builder.load(pointer_at(builder, address, kind), align=1)
    return _looked_up(builder, builder.zext(bytes_, shorts))


_TABLE = torch.arange(128, dtype=torch.uint8).view(FP8).to(torch.bfloat16)
_LOOKED_UP = 32
"""Numbers that one instruction looks up."""


def _looked_up(builder: Any, codes: Any) -> Any:
    """Bits of bfloat16 of up to `_LOOKED_UP` codes of `FP8`, as large."""
    count, kind = codes.type.count, ir.VectorType(_SHORT, _LOOKED_UP)
    order = [min(index, count - 1) for index in range(_LOOKED_UP)]
    order = ir.Constant(ir.VectorType(_WORD, _LOOKED_UP), order)
    codes = builder.shuffle_vector(codes, codes, order)
    numbers = _TABLE.view(torch.int16).tolist()
    tables = [
        ir.Constant(kind, numbers[first : first + _LOOKED_UP])
        for first in range(0, len(numbers), _LOOKED_UP)
    ]
    # Of a code the instruction sees 6 bits.
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind] * 3),
        "llvm.x86.avx512.vpermi2var.hi.512",
    )
    small, large = (
        builder.call(function, [tables[first], codes, tables[first + 1]])
        for first in (0, 2)
    )

    def every(value: int) -> ir.Constant:
        return ir.Constant(kind, [value] * _LOOKED_UP)

    is_small = builder.icmp_unsigned("==", builder.and_(codes, every(64)), every(0))
    sign = builder.shl(builder.and_(codes, every(128)), every(8))
    found = builder.or_(builder.select(is_small, small, large), sign)
    return _split(builder, found, _LOOKED_UP // count)[0]


def narrow_to(builder: Any, address: Any, vector: Any, element: Any) -> None:
    """Store a vector as cache elements, each rounded to the nearest, ties to even."""
    if element == types.float32:
        builder.store(vector, pointer_at(builder, address, FLOATS), align=4)
        return
    if element == types.int16:
        halves = builder.fptrunc(vector, _HALVES)
        builder.store(halves, pointer_at(builder, address, _HALVES), align=2)
        return
    bits = builder.bitcast(vector, WORDS)
    odd = builder.and_(builder.lshr(bits, every_word(16)), every_word(1))
    rounded = builder.add(bits, builder.add(odd, every_word(0x7FFF)))
    # Rounding up would carry some NaN into infinity.
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    rounded = builder.select(is_nan, every_word(0x7FC00000), rounded)
    shorts = builder.trunc(builder.lshr(rounded, every_word(16)), _SHORTS)
    builder.store(shorts, pointer_at(builder, address, _SHORTS), align=2)


def prefetch_at(builder: Any, address: Any) -> None:
    """Bring a line into the second cache; processors do not look as far."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, second_cache, data = _WORD(0), _WORD(2), _WORD(1)
    line = pointer_at(builder, address, _BYTE)
    builder.call(function, [line, read, second_cache, data])


def _larger_of(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


# What compiled loops call.


def instruction(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Let compiled loops call what builds instructions.

    Args:
        result: Numba's type.
        kinds: Numba's types of the arguments, None for any. In place of such a value
            the function that builds gets its type.
    """

    def make(build: Callable[..., Any]) -> Any:
        def operation(_context: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
                pairs = zip(given, values, kinds, strict=True)
                chosen = [one if kind is None else value for one, value, kind in pairs]
                made = build(builder, *chosen)
                return context.get_dummy_value() if result == types.void else made

            pairs = zip(given, kinds, strict=True)
            return result(*(kind or one for one, kind in pairs)), generate

        names = ["context", *(f"argument{index}" for index in range(len(kinds)))]
        # Numba asks how many there are.
        operation.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        operation.__name__, operation.__doc__ = build.__name__, build.__doc__
        return intrinsic(operation)

    return make


_of_two = instruction(VECTOR, VECTOR, VECTOR)
add = _of_two(lambda builder, one, other: builder.fadd(one, other))
subtract = _of_two(lambda builder, one, other: builder.fsub(one, other))
multiply = _of_two(lambda builder, one, other: builder.fmul(one, other))
larger = _of_two(_larger_of)
"""The first where it is larger, else the second: NaN in the first is passed over."""
multiply_add = instruction(VECTOR, VECTOR, VECTOR, VECTOR)(multiply_add_of)
splat = instruction(VECTOR, types.float32)(broadcast)


def _reduction(name: str, start: list[ir.Constant]) -> Any:
    def build(builder: Any, vector: Any) -> Any:
        kinds = [value.type for value in start]
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOAT, [*kinds, FLOATS]),
            f"llvm.vector.reduce.{name}.v{LANES}f32",
        )
        return builder.call(function, [*start, vector], fastmath=("reassoc",))

    return instruction(types.float32, VECTOR)(build)


sum_of = _reduction("fadd", [_FLOAT(-0.0)])
largest_of = _reduction("fmax", [])


@instruction(VECTOR, types.int64)
def load(builder: Any, address: Any) -> Any:
    """`LANES` numbers in fp32 from an address on."""
    return widened_from(builder, address, types.float32)


@instruction(types.void, types.int64, VECTOR)
def store(builder: Any, address: Any, vector: Any) -> None:
    """Store fp32 from an address on."""
    narrow_to(builder, address, vector, types.float32)


def _each_code(builder: Any, code: Any, build: Callable[[Any], Any]) -> list[Any]:
    """What `build` makes for each element type, and the block where it is made."""
    after = builder.append_basic_block("after")
    switch = builder.switch(code, after)
    made = []
    for number, element in enumerate(_QUERIES.values()):
        block = builder.append_basic_block("element")
        switch.add_case(_LONG(number), block)
        with builder.goto_block(block):
            made.append((build(element), builder.basic_block))
            builder.branch(after)
    first = builder.basic_block
    builder.position_at_end(after)
    return [(constant(0.0), first), *made]


@instruction(VECTOR, types.int64, types.int64)
def load_as(builder: Any, address: Any, code: Any) -> Any:
    """`LANES` elements from an address on, of the dtype with a code, as fp32."""
    made = _each_code(
        builder, code, lambda element: widened_from(builder, address, element)
    )
    result = builder.phi(FLOATS)
    for value, block in made:
        result.add_incoming(value, block)
    return result


@instruction(types.void, types.int64, VECTOR, types.int64)
def store_as(builder: Any, address: Any, vector: Any, code: Any) -> None:
    """Store elements of the dtype with a code, rounded to the nearest."""
    _each_code(
        builder, code, lambda element: narrow_to(builder, address, vector, element)
    )


@instruction(VECTOR, types.int64, VECTOR)
def keep_marked(builder: Any, marks: Any, vector: Any) -> Any:
    """A vector with -inf where the byte at address `marks` is 0."""
    kind = ir.VectorType(_BYTE, LANES)
    marks = builder.load(pointer_at(builder, marks, kind), align=1)
    marked = builder.icmp_unsigned("!=", marks, ir.Constant(kind, [0] * LANES))
    return builder.select(marked, vector, constant(float("-inf")))
