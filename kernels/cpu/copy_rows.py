"""Copies cache rows between slots, of one request's blocks or of two's.

An item is the keys or the values of a KV head. Its rows are read whole, into a thread's
own memory, before any is written: source and target may overlap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.threads import (
    Loop,
    compiled,
    copy_element,
    read,
    share,
    thread_index,
    write,
)

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
    for index in range(call.count):
        slot: Any = index
        if slots:
            slot = np.int64(read(slots, types.int32, first + index))
        block, rest = divmod(slot, block_size)
        block = np.int64(read(blocks, types.int32, block))
        half = block * 2 * call.num_kv_heads + item
        write(places, types.int64, index, half * block_size * size + rest * step)


@compiled
def _copy_keys(call: Any, source: int, target: int, kept: int) -> None:
    """Copy columns, by way of `kept`, the address of [head_size, count]."""
    cache, step, element = call.cache, call.block_size, call.element
    for places in (source, target):
        for first in range(0, call.count, RUN):
            end = min(first + RUN, call.count)
            for d in range(call.head_size):
                for index in range(first, end):
                    at = read(places, types.int64, index) + d * step
                    number = d * call.count + index
                    if places == source:
                        copy_element(cache, at, kept, number, element)
                    else:
                        copy_element(kept, number, cache, at, element)


@compiled
def _copy_values(call: Any, source: int, target: int, kept: int) -> None:
    """Copy rows, by way of `kept`, the address of [count, head_size]."""
    cache, size, element = call.cache, call.head_size, call.element
    for places in (source, target):
        for index in range(call.count):
            at, number = read(places, types.int64, index), index * size
            for d in range(size):
                if places == source:
                    copy_element(cache, at + d, kept, number + d, element)
                else:
                    copy_element(kept, number + d, cache, at + d, element)


def _copy(data: Any) -> None:
    call = carray(data, 1)[0]
    count, index = call.count, np.int64(thread_index())
    source = call.places + 16 * count * index
    target = source + 8 * count
    kept = call.kept + count * call.head_size * call.itemsize * index
    first, end = share(2 * call.num_kv_heads)
    for item in range(first, end):
        _locate(call, item, call.source_blocks, call.source, source)
        _locate(call, item, call.target_blocks, call.target, target)
        if item % 2:
            _copy_values(call, source, target, kept)
        else:
            _copy_keys(call, source, target, kept)


LOOP = Loop(
    _copy,
    [
        *("cache", "num_kv_heads", "block_size", "head_size"),
        *("source_blocks", "source", "target_blocks", "target"),
        *("num_rankings", "count", "places", "kept", "itemsize"),
    ],
)


def copy_rows(
    kv_cache: torch.Tensor,
    head_size: int,
    source_blocks: torch.Tensor,
    source: torch.Tensor,
    target_blocks: torch.Tensor,
    target: torch.Tensor | None = None,
) -> None:
    """Copy the key and value rows of every KV head, bit by bit.

    Every source row of a head is read before a target row of that head is written. A
    thread holds the keys or the values of a head.

    Args:
        kv_cache: as this package describes.
        head_size: elements of a row.
        source_blocks: block ids of a request, int32.
        source: [num_rankings, num_rows] slots in the request, slot s being row
            s % block_size of its block s // block_size, int32; num_rankings is
            num_kv_heads, or 1 for all heads alike.
        target_blocks: as source_blocks.
        target: as source, distinct in a head; None for 0..num_rows-1.
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
    places = torch.empty(threads, 2, count, dtype=torch.int64)
    kept = torch.empty(threads, count * head_size * itemsize, dtype=torch.uint8)
    LOOP.run(
        BITS[itemsize],
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
        places.data_ptr(),
        kept.data_ptr(),
        itemsize,
    )
