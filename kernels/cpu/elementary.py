"""Exponential and hyperbolic tangent of vectors, for LLVM to inline."""

from __future__ import annotations

from typing import Any

from vllm_avl.kernels.cpu.vectors import (
    FLOATS,
    VECTOR,
    WORDS,
    constant,
    every_word,
    instruction,
    multiply_add_of,
)


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    total = constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = multiply_add_of(builder, total, x, constant(coefficient))
    return total


_ROUND = 1.5 * 2**23  # added to a number below 2^22, leaves its integer in the low bits
_LOG2_E = 1.44269504088896341
_LN_2 = 0.693359375, -2.12194440e-4  # the first has few bits: products are exact
_EXP = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3]
_EXP += [4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1]
_LOWEST, _HIGHEST = -87.3, 88.0


def exponential_of(builder: Any, x: Any) -> Any:
    """Exponential up to 88, as Cephes: within 2 ulp; below -87.3 it is 0."""
    # NaN passes every comparison below unchanged.
    too_high = builder.fcmp_ordered(">", x, constant(_HIGHEST))
    x = builder.select(too_high, constant(_HIGHEST), x)
    shifted = multiply_add_of(builder, x, constant(_LOG2_E), constant(_ROUND))
    power = builder.fsub(shifted, constant(_ROUND))
    rest = multiply_add_of(builder, power, constant(-_LN_2[0]), x)
    rest = multiply_add_of(builder, power, constant(-_LN_2[1]), rest)
    curve = _polynomial(builder, rest, _EXP)
    square = builder.fmul(rest, rest)
    near_1 = multiply_add_of(builder, curve, square, rest)
    near_1 = builder.fadd(near_1, constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, WORDS), every_word(23))
    bits = builder.add(builder.bitcast(near_1, WORDS), exponent)
    is_nan = builder.fcmp_unordered("uno", x, x)
    result = builder.select(is_nan, x, builder.bitcast(bits, FLOATS))
    too_low = builder.fcmp_ordered("<", x, constant(_LOWEST))
    return builder.select(too_low, constant(0.0), result)


_TANH = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2]
_TANH += [1.33314422036e-1, -3.33332819422e-1]


def _absolute_and_sign(builder: Any, x: Any) -> tuple[Any, Any]:
    bits = builder.bitcast(x, WORDS)
    absolute = builder.and_(bits, every_word(0x7FFFFFFF))
    return builder.bitcast(absolute, FLOATS), builder.and_(bits, every_word(0x80000000))


def tanh_of(builder: Any, x: Any) -> Any:
    """Hyperbolic tangent, as Cephes."""
    size, sign = _absolute_and_sign(builder, x)
    square = builder.fmul(x, x)
    curve = builder.fmul(_polynomial(builder, square, _TANH), square)
    small = multiply_add_of(builder, curve, x, x)
    power = exponential_of(builder, builder.fadd(size, size))
    ratio = builder.fdiv(constant(2.0), builder.fadd(power, constant(1.0)))
    far = builder.fsub(constant(1.0), ratio)
    far = builder.bitcast(builder.or_(builder.bitcast(far, WORDS), sign), FLOATS)
    return builder.select(builder.fcmp_ordered(">", size, constant(0.625)), far, small)


exponential = instruction(VECTOR, VECTOR)(exponential_of)
tanh = instruction(VECTOR, VECTOR)(tanh_of)
