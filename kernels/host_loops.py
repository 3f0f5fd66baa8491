"""Attention and exchange over one KV head of a cache on a CPU, compiled by Numba.

`kernels.host` describes the cache, and runs these on its threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be taken in any order; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
LINE = 64
"""Bytes of a processor's cache line."""
PAIRS_AHEAD = 4
"""How early a pair of rows is fetched before it is exchanged."""
UNSIGNED = np.uintp
"""Indices that cannot count from an array's end, which would take a look at each."""


@intrinsic
def _prefetch(_context: Any, array: Any, _index: Any) -> Any:
    """Bring an element's line into the second cache; processors do not look as far."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        elements = context.make_array(signature.args[0])(context, builder, values[0])
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(
            builder.module, function, "llvm.prefetch.p0"
        )
        address = builder.gep(elements.data, [values[1]])
        read, second_cache, data = number(0), number(2), number(1)
        arguments = [builder.bitcast(address, pointer), read, second_cache, data]
        builder.call(prefetch, arguments)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@njit
def _next_read(mask: Any, index: int, end: int, size: int) -> int:
    """First block from `index` on that has a row to read; `end` where none has."""
    while index < end and (index + 1) * size <= len(mask):
        for slot in range(index * size, (index + 1) * size):
            if mask[slot]:
                return index
        index += 1
    return min(index, end)


@njit
def _picked(mask: Any, index: int, last: int, size: int) -> Any:
    """Slots of a block that are read, ascending."""
    picked, count = np.empty(size, np.int64), 0
    for slot in range(index * size, min((index + 1) * size, last)):
        if slot >= len(mask) or mask[slot]:
            picked[count] = slot - index * size
            count += 1
    return picked[:count]


@njit(fastmath=FAST)
def _exponentiate(row: Any, norm: Any) -> None:
    """Turn logits into weights, and leave the largest logit and the weights' sum."""
    largest = np.float32(-np.inf)
    for token in range(len(row)):
        largest = max(largest, row[token])
    norm[0], norm[1] = largest, 0
    if largest == -np.inf:
        row[:] = 0
        return
    total = np.float32(0)
    for token in range(len(row)):
        row[token] = np.exp(row[token] - largest)
        total += row[token]
    norm[1] = total


def compile_attend(load: Any, itemsize: int) -> Any:  # noqa: C901 (they share `load`)
    """Make the attention of a row's KV head, for caches whose elements `load` reads.

    It reads a part of the row's blocks, and leaves weights, output and what normalises
    them: parts are put together by their norms. `itemsize` is an element's, in bytes.
    """
    line = LINE // itemsize

    @njit(inline="always")
    def prefetch_row(rows: Any, index: int, size: int) -> None:
        for first in range(index * size, (index + 1) * size, line):
            _prefetch(rows, first)

    @njit(inline="always")
    def add(factors: Any, rows: Any, index: int, sums: Any) -> None:
        factor, at = factors[index], UNSIGNED(index * len(sums))
        for k in range(len(sums)):
            sums[k] += factor * load(rows[at + UNSIGNED(k)])

    @njit(inline="always")
    def add_four(factors: Any, rows: Any, picked: Any, first: int, sums: Any) -> None:
        # Sums are written once for four rows.
        i, j = picked[first], picked[first + 1]
        m, n = picked[first + 2], picked[first + 3]
        a, b, c, d = factors[i], factors[j], factors[m], factors[n]
        size = len(sums)
        at_a, at_b = UNSIGNED(i * size), UNSIGNED(j * size)
        at_c, at_d = UNSIGNED(m * size), UNSIGNED(n * size)
        for index in range(size):
            k = UNSIGNED(index)
            sums[k] += (
                a * load(rows[at_a + k])
                + b * load(rows[at_b + k])
                + c * load(rows[at_c + k])
                + d * load(rows[at_d + k])
            )

    @njit(inline="always")
    def add_picked(
        factors: Any, rows: Any, picked: Any, sums: Any, ahead: Any, picked_ahead: Any
    ) -> None:
        fours = len(picked) // 4 * 4
        for first in range(0, fours, 4):
            end = min(first + 4, len(picked_ahead))
            for index in range(first, end):
                prefetch_row(ahead, picked_ahead[index], len(sums))
            add_four(factors, rows, picked, first, sums)
        for index in range(fours, len(picked_ahead)):
            prefetch_row(ahead, picked_ahead[index], len(sums))
        for index in range(fours, len(picked)):
            add(factors, rows, picked[index], sums)

    @njit(inline="always")
    def hide(logits: Any, read: Any, soft_cap: float) -> None:
        if soft_cap > 0:
            for slot in range(len(logits)):
                logits[slot] = soft_cap * np.tanh(logits[slot] / soft_cap)
        for slot in range(len(read)):
            if not read[slot]:
                logits[slot] = -np.inf

    @njit(fastmath=FAST)
    def attend(
        query: Any,  # [group, head_size], scaled
        cache: Any,
        head: int,
        blocks: Any,  # [num_row_blocks]
        first: int,
        end: int,
        num_tokens: int,
        mask: Any,  # [num_masked_slots]
        soft_cap: float,
        output: Any,  # [group, head_size]
        weights: Any,  # [group, num_row_blocks * block_size]
        norms: Any,  # [group, 2]
    ) -> None:
        group, head_size = query.shape
        size = cache.shape[3] // head_size
        last = min(end * size, num_tokens)
        columns = np.arange(head_size)
        output[:] = 0
        for member in range(group):
            weights[member, first * size : end * size] = -np.inf
        index = _next_read(mask, first, end, size)
        while index < end:
            following = _next_read(mask, index + 1, end, size)
            start, stop = index * size, (index + 1) * size
            keys = cache[blocks[index], head, 0]
            ahead = cache[blocks[min(following, end - 1)], head, 0]
            for member in range(group):
                logits = weights[member, start:stop]
                logits[:] = 0
                fetched = columns if member == 0 else columns[:0]
                add_picked(query[member], keys, columns, logits, ahead, fetched)
                hide(logits, mask[start:stop], soft_cap)
            index = following
        for member in range(group):
            _exponentiate(weights[member, first * size : last], norms[member])
        index = _next_read(mask, first, end, size)
        picked = _picked(mask, index, last, size)
        while index < end:
            following = _next_read(mask, index + 1, end, size)
            values = cache[blocks[index], head, 1]
            ahead = cache[blocks[min(following, end - 1)], head, 1]
            picked_ahead = _picked(mask, following, last, size)
            for member in range(group):
                logits = weights[member, index * size : (index + 1) * size]
                fetched = picked_ahead if member == 0 else picked_ahead[:0]
                add_picked(logits, values, picked, output[member], ahead, fetched)
            index, picked = following, picked_ahead

    return attend


@njit(inline="always")
def _prefetch_slot(halves: Any, slot: int, size: int, head_size: int) -> None:
    """Fetch a row's key, of a line for each element, and its value."""
    keys, values = halves[0], halves[1]
    for d in range(head_size):
        _prefetch(keys, d * size + slot)
    for d in range(0, head_size, LINE // values.itemsize):
        _prefetch(values, slot * head_size + d)


@njit(inline="always")
def _exchange_elements(
    one: Any, first: int, other: Any, second: int, step: int, count: int
) -> None:
    for index in range(count):
        at = UNSIGNED(index) * step
        kept = one[first + at]
        one[first + at] = other[second + at]
        other[second + at] = kept


@njit
def exchange(
    cache: Any,
    head: int,
    blocks: Any,  # [num_request_blocks]
    source: Any,  # [num_pairs] positions in the request
    target: Any,
    head_size: int,
) -> None:
    """Exchange rows in pairs."""
    size = cache.shape[3] // head_size
    for index in range(len(source)):
        ahead = min(index + PAIRS_AHEAD, len(source) - 1)
        for slots in (source, target):
            of_block = cache[blocks[slots[ahead] // size], head]
            _prefetch_slot(of_block, slots[ahead] % size, size, head_size)
        one = cache[blocks[source[index] // size], head]
        other = cache[blocks[target[index] // size], head]
        i, j = UNSIGNED(source[index] % size), UNSIGNED(target[index] % size)
        _exchange_elements(one[0], i, other[0], j, UNSIGNED(size), head_size)
        first, second = i * UNSIGNED(head_size), j * UNSIGNED(head_size)
        _exchange_elements(one[1], first, other[1], second, UNSIGNED(1), head_size)
