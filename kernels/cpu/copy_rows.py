"""Copies cache rows between slots, of one request's blocks or of two's.

An item is the keys or the values of a KV head. Where rows are written that are read for
other ones, an item's are read whole, into a thread's own memory, before any is written.
Keys lie by column: they are compressed there first, a window of slots at a time, where
the slots ascend and the processor can.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.compress import (
    COMPRESSED,
    PIECE,
    WINDOW,
    compress,
    copy_piece,
)
from vllm_avl.kernels.cpu.packed import (
    copy_key,
    copy_value,
    copy_value_pair,
    key_place,
    value_place,
)
from vllm_avl.kernels.cpu.threads import (
    Loop,
    compiled,
    copy_element,
    read,
    scratch_of,
    share,
    thread_index,
    write,
)
from vllm_avl.kernels.cpu.vectors import LANES

BITS = {1: types.uint8, 2: types.uint16, 4: types.uint32}
"""What elements of 1, 2 and 4 bytes are moved as."""
RUN = 64
"""Rows whose elements are moved before the next column is."""


@compiled
def _locate(call: Any, item: int, blocks: int, slots: int, places: int) -> None:
    """Write where each slot's first element lies in the cache.

    Args:
        item: number of the KV head, twice, and 1 more for its values.
        blocks: address of block ids.
        slots: address of [num_rankings, count] slots; 0 stands for 0..count-1.
        places: address of int64 [count].
    """
    size, block_size = call.head_size, call.block_size
    step = size if item % 2 else 1
    first = item // 2 * call.count if call.num_rankings > 1 else 0
    half_size = block_size * size
    for index in range(call.count):
        slot: Any = index
        if slots:
            slot = np.int64(read(slots, types.int32, first + index))
        block, rest = divmod(slot, block_size)
        block = np.int64(read(blocks, types.int32, block))
        place = rest * step
        if call.packed:
            place = value_place(rest) if item % 2 else key_place(rest, size)
        half = block * 2 * call.num_kv_heads + item
        write(places, types.int64, index, half * half_size + place)


@compiled
def _keep_keys(call: Any, source: int, kept: int) -> None:
    """Read columns into [head_size, `call.width`] at address `kept`, one by one."""
    cache, step, element = call.cache, call.block_size, call.element
    for first in range(0, call.count, RUN):
        end = min(first + RUN, call.count)
        for d in range(call.head_size):
            for index in range(first, end):
                at = read(source, types.int64, index) + d * step
                copy_element(cache, at, kept, d * call.width + index, element)


@compiled
def _first_slot(call: Any, item: int) -> int:
    """Address of the slots that an item reads."""
    first = item // 2 * call.count if call.num_rankings > 1 else 0
    return call.source + 4 * first


@compiled
def _ascends(call: Any, item: int) -> bool:
    """Whether nearly every slot is higher than the one before it."""
    slots, num_lower = _first_slot(call, item), 0
    for index in range(1, call.count):
        before = read(slots, types.int32, index - 1)
        num_lower += read(slots, types.int32, index) <= before
    return 8 * num_lower < call.count


@compiled
def _keep_windows(call: Any, item: int, source: int, kept: int) -> None:
    """As `_keep_keys`, of slots that ascend: windows of them at a time."""
    slots = _first_slot(call, item)
    step, size = call.block_size * call.itemsize, call.itemsize
    index = 0
    while index < call.count:
        first, last = index, np.int64(-1)
        window = np.int64(read(slots, types.int32, index)) // WINDOW
        marks = np.int64(0)
        while index < call.count:
            slot = np.int64(read(slots, types.int32, index))
            if slot // WINDOW != window or slot <= last:
                break
            marks |= np.int64(1) << (slot - window * WINDOW)
            last = slot
            index += 1
        at = read(source, types.int64, index - 1) - (last - window * WINDOW)
        line, to = call.cache + at * size, kept + first * size
        for _ in range(call.head_size):
            compress(line, marks, to, call.element)
            line += step
            to += call.width * size


@compiled
def _place_keys(call: Any, target: int, kept: int) -> None:
    """Write what `_keep_keys` has read."""
    cache, step, element = call.cache, call.block_size, call.element
    for first in range(0, call.count, RUN):
        end = min(first + RUN, call.count)
        for d in range(call.head_size):
            for index in range(first, end):
                at = read(target, types.int64, index) + d * step
                copy_element(kept, d * call.width + index, cache, at, element)


@compiled
def _place_blocks(call: Any, target: int, kept: int) -> int:
    """As `_place_keys`, of whole blocks of targets; return how many rows those were."""
    step, size = call.block_size * call.itemsize, call.itemsize
    num_rows = call.count // call.block_size * call.block_size
    for first in range(0, num_rows, call.block_size):
        to = call.cache + read(target, types.int64, first) * size
        line = kept + first * size
        for _ in range(call.head_size):
            for piece in range(0, step, PIECE):
                copy_piece(line + piece, to + piece)
            to += step
            line += call.width * size
    return num_rows


@compiled
def _copy_values(call: Any, source: int, target: int, kept: int) -> None:
    """Copy rows, by way of `kept` where others are read that have been written."""
    size = call.head_size * call.itemsize
    for index in range(call.count):
        at = call.cache + read(source, types.int64, index) * call.itemsize
        to = kept + index * size
        if not call.in_place:
            to = call.cache + read(target, types.int64, index) * call.itemsize
        for piece in range(0, size, PIECE):
            copy_piece(at + piece, to + piece)
    if call.in_place:
        for index in range(call.count):
            to = call.cache + read(target, types.int64, index) * call.itemsize
            for piece in range(0, size, PIECE):
                copy_piece(kept + index * size + piece, to + piece)


@compiled
def _copy_packed_keys(call: Any, source: int, target: int, kept: int) -> None:
    """Copy keys that lie packed, by way of `kept` as `_copy_values` does."""
    size, cache, step = call.head_size, call.cache, 2 * LANES
    element = call.element
    for index in range(call.count):
        at = read(source, types.int64, index)
        if call.in_place:
            copy_key(cache, at, step, kept, index * size, 2, size, element)
        else:
            to = read(target, types.int64, index)
            copy_key(cache, at, step, cache, to, step, size, element)
    if call.in_place:
        for index in range(call.count):
            to = read(target, types.int64, index)
            copy_key(kept, index * size, 2, cache, to, step, size, element)


@compiled
def _copy_packed_values(call: Any, source: int, target: int, kept: int) -> None:
    """The same, of values."""
    size, cache, element = call.head_size, call.cache, call.element
    steps, together = (2, call.block_size * LANES), (1, LANES)
    first = 0
    if call.itemsize == 2 and not call.in_place and not call.target:
        for first in range(0, call.count - 1, 2):
            one = read(source, types.int64, first)
            other = read(source, types.int64, first + 1)
            to = read(target, types.int64, first)
            copy_value_pair(cache, one, other, to, steps[1], size)
        first = call.count // 2 * 2
    for index in range(first, call.count):
        at = read(source, types.int64, index)
        if call.in_place:
            to = index * size
            copy_value(cache, at, steps, kept, to, together, size, element)
        else:
            to = read(target, types.int64, index)
            copy_value(cache, at, steps, cache, to, steps, size, element)
    if call.in_place:
        for index in range(call.count):
            at, to = index * size, read(target, types.int64, index)
            copy_value(kept, at, together, cache, to, steps, size, element)


def _copy(data: Any) -> None:
    call = carray(data, 1)[0]
    count, index = call.count, np.int64(thread_index())
    source = call.places + 16 * count * index
    target = source + 8 * count
    kept = call.kept + call.width * call.head_size * call.itemsize * index
    first, end = share(2 * call.num_kv_heads)
    for item in range(first, end):
        _locate(call, item, call.source_blocks, call.source, source)
        _locate(call, item, call.target_blocks, call.target, target)
        if call.packed:
            if item % 2:
                _copy_packed_values(call, source, target, kept)
            else:
                _copy_packed_keys(call, source, target, kept)
            continue
        if item % 2:
            _copy_values(call, source, target, kept)
            continue
        if call.compresses and _ascends(call, item):
            _keep_windows(call, item, source, kept)
        else:
            _keep_keys(call, source, kept)
        if call.target or _place_blocks(call, target, kept) < count:
            _place_keys(call, target, kept)


LOOP = Loop(
    _copy,
    [
        *("cache", "num_kv_heads", "block_size", "head_size"),
        *("source_blocks", "source", "target_blocks", "target"),
        *("num_rankings", "count", "places", "kept", "itemsize"),
        *("width", "compresses", "in_place", "packed"),
    ],
)


def copy_rows(
    kv_cache: torch.Tensor,
    head_size: int,
    source_blocks: torch.Tensor,
    source: torch.Tensor,
    target_blocks: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    in_place: bool = True,
    packed: bool = False,
) -> None:
    """Copy the key and value rows of every KV head, bit by bit.

    A thread holds the keys or the values of a head.

    Args:
        kv_cache: as this package describes.
        head_size: elements of a row.
        source_blocks: block ids of a request, int32.
        source: [num_rankings, num_rows] slots in the request, slot s being row
            s % block_size of its block s // block_size, int32; num_rankings is
            num_kv_heads, or 1 for all heads alike.
        target_blocks: as source_blocks.
        target: as source, distinct in a head; None for 0..num_rows-1.
        in_place: whether rows may be written that are read for others: all of a head
            are read first.
        packed: whether rows lie packed; elements have one or two bytes then.
    """
    num_rankings, count = source.shape
    num_kv_heads = kv_cache.shape[1]
    assert num_rankings in (1, num_kv_heads)
    assert target is None or target.shape == source.shape
    slots = [source] if target is None else [source, target]
    for numbers in (source_blocks, target_blocks, *slots):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    assert kv_cache.is_contiguous()
    itemsize, threads = kv_cache.element_size(), torch.get_num_threads()
    # What is compressed is stored in whole windows.
    width = count + WINDOW
    of_places = 16 * count * threads
    places = scratch_of(of_places + width * head_size * itemsize * threads)
    bits = BITS[itemsize]
    LOOP.run(
        bits,
        kv_cache.data_ptr(),
        num_kv_heads,
        kv_cache.shape[3] // head_size,
        head_size,
        source_blocks.data_ptr(),
        source.data_ptr(),
        target_blocks.data_ptr(),
        0 if target is None else target.data_ptr(),
        num_rankings,
        count,
        places,
        places + of_places,
        itemsize,
        width,
        bits in COMPRESSED,
        in_place,
        packed,
    )
