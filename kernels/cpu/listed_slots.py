"""Lists the tiles and values of a part of a row that are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from vllm_avl.kernels.cpu.packed import ENTRY, VECTOR, end_pairs, list_pair
from vllm_avl.kernels.cpu.threads import compiled, read, write
from vllm_avl.kernels.cpu.tiles import AHEAD, PART, PICKED_BYTES, TILE, end_list

TILES_BYTES = 16 * (PART // TILE)


@compiled
def _list_values(
    lists: int, count: int, values: int, step: int, tile: int, marks: int
) -> int:
    """List a tile's values that are read, `step` bytes apart; return the count."""
    for number in range(TILE):
        write(lists, types.int64, 2 * count, values + number * step)
        write(lists, types.int64, 2 * count + 1, 4 * (tile * TILE + number))
        count += read(marks, types.uint8, number)
    return count


@compiled
def _list_pairs(
    lists: int, count: int, values: int, step: int, tile: int, marks: int
) -> int:
    """The same, of packed values."""
    for pair in range(TILE // 2):
        is_read = read(marks, types.uint8, 2 * pair)
        is_read += 2 * read(marks, types.uint8, 2 * pair + 1)
        number = tile * TILE + 2 * pair
        count = list_pair(lists, count, values + pair * step, number, is_read)
    return count


@compiled
def list_part(call: Any, row: int, head: int, part: int, lists: int) -> tuple:
    """List the tiles of a part with a slot to read, and the values of such slots.

    `lists` is the address of picked values as `add_tile` takes them, or `list_pair`
    writes them where they are packed, then of int64 [PART // TILE, 2], address of a
    tile's keys and its number in the part, then of a byte for each slot of the listed
    tiles: whether it is read.

    Returns:
        Numbers of tiles and of values.
    """
    tiles = lists + PICKED_BYTES
    marks = tiles + TILES_BYTES
    block_size, itemsize = call.block_size, call.itemsize
    half = block_size * call.head_size * itemsize
    cache = call.cache + head * 2 * half
    length = read(call.num_tokens, types.int64, row)
    mask = read(call.masks, types.int64, row)
    num_masked = read(call.num_masked, types.int64, row) if mask else 0
    mask += head * read(call.mask_steps, types.int64, row)
    blocks = read(call.blocks, types.int64, row)
    num_tiles, num_picked = 0, 0
    for first in range(part * PART, min((part + 1) * PART, length), TILE):
        block, slot = divmod(first, block_size)
        block = np.int64(read(blocks, types.int32, block))
        keys = cache + block * (call.num_kv_heads * 2 * half)
        values = keys + half
        of_tile = marks + num_tiles * TILE
        for number in range(TILE):
            at = first + number
            is_read = at < length
            if at < num_masked:
                is_read &= read(mask, types.uint8, at) != 0
            write(of_tile, types.uint8, number, is_read)
        before = num_picked
        if call.packed:
            keys += slot * call.head_size * itemsize
            step = VECTOR * itemsize
            values += slot // 2 * step
            num_picked = _list_pairs(
                lists, num_picked, values, step, num_tiles, of_tile
            )
        else:
            keys += slot * itemsize
            step = call.head_size * itemsize
            values += slot * step
            num_picked = _list_values(
                lists, num_picked, values, step, num_tiles, of_tile
            )
        if num_picked > before:
            write(tiles, types.int64, 2 * num_tiles, keys)
            number = first // TILE - part * (PART // TILE)
            write(tiles, types.int64, 2 * num_tiles + 1, number)
            num_tiles += 1
    if call.packed:
        end_pairs(lists, num_picked)
    else:
        end_list(lists, num_picked)
    return num_tiles, num_picked


@compiled
def move_lists(
    call: Any, lists: int, num_tiles: int, num_picked: int, distance: int
) -> None:
    """Let what `list_part` has listed be the same of another head."""
    tiles = lists + PICKED_BYTES
    for tile in range(num_tiles):
        keys = read(tiles, types.int64, 2 * tile)
        write(tiles, types.int64, 2 * tile, keys + distance)
    step = ENTRY if call.packed else 2
    for index in range(0, step * (num_picked + AHEAD), step):
        values = read(lists, types.int64, index)
        write(lists, types.int64, index, values + distance)
