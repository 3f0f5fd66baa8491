"""Chooses what of a prompt is stored, and in which order: the best first, or ascending.

A thread takes a ranking, digit by digit of its scores' bits: a radix sort, or without
core the search for the last of the best, which needs no order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.threads import (
    Loop,
    compiled,
    in_lines,
    read,
    scratch_of,
    share,
    thread_index,
    write,
)

BITS = 32
"""Of a key."""
DIGIT = 11
"""Bits that a pass sorts by."""
VALUES = 1 << DIGIT
"""Values of a digit."""
SIGN, LOWEST = np.uint32(1 << 31), np.uint32(0xFF7FFFFF)
REST, INFINITE, HIGHEST = (np.uint32(n) for n in (0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF))


@compiled
def _key(bits: Any) -> Any:
    """What fp32 numbers are sorted by, descending.

    NaN is the lowest number, and infinite ones are as the highest and the lowest.
    """
    bits = np.uint32(bits)
    size = np.uint32(bits & REST)
    if size > INFINITE:
        bits = LOWEST
    elif size == INFINITE:
        bits = np.uint32(np.uint32(bits & SIGN) | HIGHEST)
    elif size == 0:
        bits = np.uint32(0)
    return bits if bits & SIGN else np.uint32(bits ^ REST)


@compiled
def _write_keys(scores: int, keys: int, size: int) -> None:
    """Write uint32 [size] keys of fp32 [size] scores."""
    for candidate in range(size):
        key = _key(read(scores, types.uint32, candidate))
        write(keys, types.uint32, candidate, key)


@compiled
def _clear(counts: int) -> None:
    for value in range(VALUES + 1):
        write(counts, types.int64, value, 0)


@compiled
def _count(counts: int, value: int) -> int:
    """Add 1 to a count, and return what it was."""
    before = read(counts, types.int64, value)
    write(counts, types.int64, value, before + 1)
    return before


@compiled
def _sort(keys: int, order: int, other: int, counts: int, size: int) -> None:
    """Sort int32 [size] candidates at `order` by their keys."""
    shift = 0
    while shift < BITS:
        _clear(counts)
        for index in range(size):
            candidate = np.int64(read(order, types.int32, index))
            key = np.int64(read(keys, types.uint32, candidate))
            _count(counts, ((key >> shift) & (VALUES - 1)) + 1)
        for value in range(VALUES):
            first = read(counts, types.int64, value)
            first += read(counts, types.int64, value + 1)
            write(counts, types.int64, value + 1, first)
        for index in range(size):
            candidate = np.int64(read(order, types.int32, index))
            key = np.int64(read(keys, types.uint32, candidate))
            place = _count(counts, (key >> shift) & (VALUES - 1))
            write(other, types.int32, place, np.int32(candidate))
        for index in range(size):
            write(order, types.int32, index, read(other, types.int32, index))
        shift += DIGIT


@compiled
def _last_key(keys: int, counts: int, size: int, rest: int) -> tuple:
    """The key of the last of the `rest` best, and how many of those have it.

    Digit by digit, the highest first, among the keys that begin as it does.
    """
    begin, shift = 0, (BITS - 1) // DIGIT * DIGIT
    while shift >= 0:
        _clear(counts)
        for candidate in range(size):
            key = np.int64(read(keys, types.uint32, candidate)) >> shift
            if key >> DIGIT == begin:
                _count(counts, key & (VALUES - 1))
        value = 0
        while read(counts, types.int64, value) < rest:
            rest -= read(counts, types.int64, value)
            value += 1
        begin = (begin << DIGIT) | value
        shift -= DIGIT
    return begin, rest


@compiled
def _keep(keys: int, order: int, counts: int, size: int, stored: int) -> None:
    """Write the `stored` best candidates to `order`, ascending."""
    if stored == 0:
        return
    last, num_last = _last_key(keys, counts, size, stored)
    place = 0
    for candidate in range(size):
        key = np.int64(read(keys, types.uint32, candidate))
        is_last = key == last and num_last > 0
        num_last -= is_last
        if key < last or is_last:
            write(order, types.int32, place, np.int32(candidate))
            place += 1


def _rank(data: Any) -> None:
    call = carray(data, 1)[0]
    size, stored, fixed = call.num_candidates, call.num_stored, call.num_fixed
    order = call.scratch + np.int64(thread_index()) * call.scratch_step
    counts, other, keys = order + 8 * size, order + 4 * size, order + call.keys
    first, end = share(call.num_rankings)
    for ranking in range(first, end):
        scores = call.scores + 4 * size * ranking
        core_scores = call.core_scores + 4 * size * ranking
        _write_keys(scores, keys, size)
        if scores == core_scores and call.has_core:
            for candidate in range(size):
                write(order, types.int32, candidate, np.int32(candidate))
            _sort(keys, order, other, counts, size)
        else:
            _keep(keys, order, counts, size, stored)
            if call.has_core:
                _write_keys(core_scores, keys, size)
                _sort(keys, order, other, counts, stored)
        to = call.positions + 4 * (fixed + stored) * ranking
        for index in range(fixed):
            position = read(call.fixed, types.int64, index)
            write(to, types.int32, index, np.int32(position))
        for index in range(stored):
            chosen = np.int64(read(order, types.int32, index))
            position = read(call.candidates, types.int64, chosen)
            write(to, types.int32, fixed + index, np.int32(position))


LOOP = Loop(
    _rank,
    [
        *("scores", "core_scores", "num_rankings", "num_candidates", "num_stored"),
        *("has_core", "candidates", "fixed", "num_fixed", "positions"),
        *("scratch", "scratch_step", "keys"),
    ],
)


def rank_rows(
    scores: torch.Tensor,
    core_scores: torch.Tensor,
    num_stored: int,
    num_core: int,
    candidates: torch.Tensor,
    fixed: torch.Tensor,
) -> torch.Tensor:
    """Put the positions that stay in order, the fixed ones in front.

    Of equal scores the lower candidate wins; NaN is the lowest score (A-VL section
    "Vision attention").

    Args:
        scores: [num_rankings, num_candidates] fp32: which of them stay.
        core_scores: as scores, their order among those; may be the same tensor.
        num_stored: candidates that stay.
        num_core: of these, how many are core.
        candidates: [num_candidates] positions, ascending, int64.
        fixed: [num_fixed] positions that stay in any case, int64.

    Returns:
        [num_rankings, num_fixed + num_stored] int32 positions. Behind the fixed ones
        the candidates with the best core scores come first where some of them are not
        core; where all are, they ascend.
    """
    is_same = core_scores is scores
    scores = scores.contiguous()
    core_scores = scores if is_same else core_scores.contiguous()
    num_rankings, num_candidates = scores.shape
    for numbers in (scores, core_scores):
        assert numbers.dtype == torch.float32
        assert numbers.shape == scores.shape
    for positions in (candidates, fixed):
        assert positions.dtype == torch.int64
        assert positions.is_contiguous()
    assert len(candidates) == num_candidates
    size = num_rankings, len(fixed) + num_stored
    positions = torch.empty(size, dtype=torch.int32)
    # Two orders of candidates, counts, then keys.
    keys = 8 * (num_candidates + VALUES + 1)
    step = 8 * in_lines(keys // 8 + num_candidates)
    LOOP.run(
        types.float32,
        scores.data_ptr(),
        core_scores.data_ptr(),
        num_rankings,
        num_candidates,
        num_stored,
        num_core < num_stored,
        candidates.data_ptr(),
        fixed.data_ptr(),
        len(fixed),
        positions.data_ptr(),
        scratch_of(step * torch.get_num_threads()),
        step,
        keys,
    )
    return positions
