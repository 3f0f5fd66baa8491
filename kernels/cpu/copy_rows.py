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
    array_at,
    compiled,
    elements_at,
    share,
    thread_index,
)

BITS = {1: types.uint8, 2: types.uint16, 4: types.uint32}
"""What elements of 1, 2 and 4 bytes are moved as."""
RUN = 64
"""Rows whose elements are moved before the next column is."""


@compiled
def _locate(call: Any, item: int, blocks_at: int, slots_at: int, places: Any) -> None:
    """Write where each slot's first element lies in the cache.

    Args:
        item: number of the KV head, twice, and 1 more for its values.
        blocks_at: address of block ids.
        slots_at: address of [num_rankings, count] slots; 0 stands for 0..count-1.
        places: [count].
    """
    size, block_size = call.head_size, call.block_size
    # Nothing is known of how many blocks there are: an array of any length will do.
    blocks = array_at(blocks_at, types.int32, (1 << 32,))
    ranking = item // 2 if call.num_rankings > 1 else 0
    slots = array_at(slots_at + 4 * ranking * call.count, types.int32, (call.count,))
    step = size if item % 2 else 1
    for index in range(call.count):
        slot = np.int64(slots[index]) if slots_at else index
        block, rest = divmod(slot, block_size)
        half = np.int64(blocks[block]) * 2 * call.num_kv_heads + item
        places[index] = half * block_size * size + rest * step


@compiled
def _copy_keys(cache: Any, source: Any, target: Any, kept: Any, step: int) -> None:
    """Copy columns, whose elements lie `step` apart; `kept` is [head_size, count]."""
    size, count = kept.shape
    for first in range(0, count, RUN):
        end = min(first + RUN, count)
        for d in range(size):
            for index in range(first, end):
                kept[d, index] = cache[source[index] + d * step]
    for first in range(0, count, RUN):
        end = min(first + RUN, count)
        for d in range(size):
            for index in range(first, end):
                cache[target[index] + d * step] = kept[d, index]


@compiled
def _copy_values(cache: Any, source: Any, target: Any, kept: Any) -> None:
    """Copy rows; `kept` is [count, head_size]."""
    count, size = kept.shape
    for index in range(count):
        for d in range(size):
            kept[index, d] = cache[source[index] + d]
    for index in range(count):
        for d in range(size):
            cache[target[index] + d] = kept[index, d]


def _copy(data: Any) -> None:
    call = carray(data, 1)[0]
    count, size, element = call.count, call.head_size, call.element
    index = np.int64(thread_index())
    places = call.places + 16 * count * index
    source = array_at(places, types.int64, (count,))
    target = array_at(places + 8 * count, types.int64, (count,))
    kept = call.kept + count * size * call.itemsize * index
    cache = elements_at(call.cache, element, (call.num_elements,))
    first, end = share(2 * call.num_kv_heads)
    for item in range(first, end):
        _locate(call, item, call.source_blocks, call.source, source)
        _locate(call, item, call.target_blocks, call.target, target)
        if item % 2:
            values = elements_at(kept, element, (count, size))
            _copy_values(cache, source, target, values)
        else:
            keys = elements_at(kept, element, (size, count))
            _copy_keys(cache, source, target, keys, call.block_size)


LOOP = Loop(
    _copy,
    [
        *("cache", "num_elements", "num_kv_heads", "block_size", "head_size"),
        *("source_blocks", "source", "target_blocks", "target"),
        *("num_rankings", "count", "places", "kept", "itemsize"),
    ]
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
        kv_cache.numel(),
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
