"""Attention of decode rows to selected keys of their sequences.

An item is a part of a row, of `PART` slots, and a KV head. Threads take items as they
come free. Each item leaves an output and what it is normalised by, and the thread
that ends a row's last item puts them together: a row's output does not depend on
which rows are beside it, nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, types
from vllm_avl.kernels.cpu.queries import lay_queries
from vllm_avl.kernels.cpu.softmax import STEP, cap, exponentiate, finite, scaled
from vllm_avl.kernels.cpu.threads import (
    Loop,
    array_at,
    compiled,
    count_up,
    thread_index,
)
from vllm_avl.kernels.cpu.tiles import AHEAD, PART, ROWS, TILE, add_tile, dot_tile
from vllm_avl.kernels.cpu.vectors import (
    CODES,
    ELEMENTS,
    keep_marked,
    load,
    multiply_add,
    splat,
    store,
    store_as,
)

_PICKED_BYTES = 16 * (PART + AHEAD)
_TILES_BYTES = 16 * (PART // TILE)


@compiled
def _list_part(call: Any, row: int, head: int, part: int, lists: int) -> Any:
    """List the tiles of a part with a slot to read, and the values of such slots.

    `lists` is the address of picked values as `add_tile` takes them, then of int64
    [PART // TILE, 2], address of a tile's keys and its number in the part, then of a
    byte for each slot of the listed tiles: whether it is read.

    Returns:
        Numbers of tiles and of values.
    """
    picked = array_at(lists, types.int64, (PART + AHEAD, 2))
    tiles = array_at(lists + _PICKED_BYTES, types.int64, (PART // TILE, 2))
    marks = array_at(lists + _PICKED_BYTES + _TILES_BYTES, types.uint8, (PART,))
    block_size, size, itemsize = call.block_size, call.head_size, call.itemsize
    half = block_size * size * itemsize
    cache = call.cache + head * 2 * half
    length = array_at(call.num_tokens, types.int64, (call.num_rows,))[row]
    mask_at = array_at(call.masks, types.int64, (call.num_rows,))[row]
    num_masked = array_at(call.num_masked, types.int64, (call.num_rows,))[row]
    if mask_at == 0:
        num_masked = 0
    mask_at += head * array_at(call.mask_steps, types.int64, (call.num_rows,))[row]
    mask = array_at(mask_at, types.uint8, (num_masked,))
    blocks_at = array_at(call.blocks, types.int64, (call.num_rows,))[row]
    num_blocks = (length + block_size - 1) // block_size
    blocks = array_at(blocks_at, types.int32, (num_blocks,))
    num_tiles, num_picked = 0, 0
    for first in range(part * PART, min((part + 1) * PART, length), TILE):
        block, slot = divmod(first, block_size)
        keys = cache + blocks[block] * (call.num_kv_heads * 2 * half)
        values = keys + half + slot * size * itemsize
        before = num_picked
        for index in range(TILE):
            at = first + index
            read = at < length and (at >= num_masked or mask[at] != 0)
            number = num_tiles * TILE + index
            marks[number] = read
            picked[num_picked, 0] = values + index * size * itemsize
            picked[num_picked, 1] = 4 * number
            num_picked += read
        if num_picked > before:
            tiles[num_tiles, 0] = keys + slot * itemsize
            tiles[num_tiles, 1] = first // TILE - part * (PART // TILE)
            num_tiles += 1
    last = max(num_picked - 1, 0)
    for index in range(num_picked, num_picked + AHEAD):
        picked[index, 0] = picked[last, 0]
    return num_tiles, num_picked


@compiled
def _weigh(
    call: Any, queries: int, lists: int, num_tiles: int, weights: int, norms: Any
) -> None:
    """Weights of the listed tiles' slots, 0 where a slot is not read."""
    tiles = array_at(lists + _PICKED_BYTES, types.int64, (PART // TILE, 2))
    marks = lists + _PICKED_BYTES + _TILES_BYTES
    group, count = call.group, num_tiles * TILE
    for tile in range(num_tiles):
        for row in range(0, group, ROWS):
            dot_tile(
                call.element,
                tiles[tile, 0],
                call.block_size * call.itemsize,
                call.head_size,
                queries + 4 * row,
                4 * group,
                min(group - row, ROWS),
                weights + 4 * (row * PART + tile * TILE),
                tiles[min(tile + 1, num_tiles - 1), 0],
            )
    for row in range(group):
        logits = weights + 4 * row * PART
        if call.soft_cap > 0:
            cap(logits, count, call.soft_cap)
        for at in range(0, 4 * count, STEP):
            store(logits + at, keep_marked(marks + at // 4, load(logits + at)))
        exponentiate(logits, count, norms[row])


@compiled
def _add_values(
    call: Any, lists: int, num_picked: int, weights: int, outputs: int
) -> None:
    """Write the sums of the listed values, weighted: fp32 [group, head_size]."""
    group, size = call.group, call.head_size
    sums = array_at(outputs, types.float32, (group * size,))
    sums[:] = 0
    for first in range(0, num_picked, TILE):
        for column in range(0, size, TILE):
            for row in range(0, group, ROWS):
                add_tile(
                    call.element,
                    lists + 16 * first,
                    min(num_picked - first, TILE),
                    column,
                    min(size - column, TILE),
                    weights + 4 * row * PART,
                    min(group - row, ROWS),
                    outputs + 4 * row * size,
                    4 * size,
                )


@compiled
def _keep_weights(
    call: Any,
    row: int,
    head: int,
    part: int,
    lists: int,
    num_tiles: int,
    weights: int,
) -> None:
    """Write a part's weights, every slot's, to where the row's probabilities go."""
    paid_at = array_at(call.paid, types.int64, (call.num_rows,))[row]
    length = array_at(call.num_tokens, types.int64, (call.num_rows,))[row]
    paid = array_at(paid_at, types.float32, (call.num_kv_heads, call.group, length))
    tiles = array_at(lists + _PICKED_BYTES, types.int64, (PART // TILE, 2))
    kept = array_at(weights, types.float32, (call.group, PART))
    first, end = part * PART, min((part + 1) * PART, length)
    for member in range(call.group):
        paid[head, member, first:end] = 0
        for tile in range(num_tiles):
            start = first + tiles[tile, 1] * TILE
            for index in range(min(end - start, TILE)):
                weight = kept[member, tile * TILE + index]
                paid[head, member, start + index] = weight


@compiled
def _put_together(
    call: Any, row: int, head: int, item: int, parts: int
) -> None:
    """Write a row's output for a KV head, of items from `item` on."""
    group, size = call.group, call.head_size
    norms = array_at(call.norms + 8 * item * group, types.float32, (parts, group, 2))
    outputs = call.outputs + 4 * item * group * size
    token = array_at(call.tokens, types.int64, (call.num_rows,))[row]
    written = call.output + token * call.output_row_step
    written += head * group * call.output_head_step
    itemsize = 4 if call.code == 0 else 2
    for member in range(group):
        _factors(norms[:, member])
        for at in range(0, 4 * size, STEP):
            total = splat(np.float32(0))
            for part in range(parts):
                values = load(outputs + 4 * (part * group + member) * size + at)
                total = multiply_add(values, splat(norms[part, member, 0]), total)
            to = written + member * call.output_head_step + at // 4 * itemsize
            store_as(to, total, call.code)
    paid_at = array_at(call.paid, types.int64, (call.num_rows,))[row]
    if paid_at:
        length = array_at(call.num_tokens, types.int64, (call.num_rows,))[row]
        paid = array_at(paid_at, types.float32, (call.num_kv_heads, group, length))
        for member in range(group):
            for part in range(parts):
                factor = norms[part, member, 0]
                for slot in range(part * PART, min((part + 1) * PART, length)):
                    paid[head, member, slot] *= factor


@compiled
def _factors(norms: Any) -> None:
    """Replace each part's largest logit by what normalises the part."""
    largest = np.float32(-np.inf)
    for part in range(len(norms)):
        largest = max(largest, norms[part, 0])
    shift, total = finite(largest), np.float32(0)
    for part in range(len(norms)):
        norms[part, 0] = scaled(np.float32(1), norms[part, 0], shift)
        total += norms[part, 0] * norms[part, 1]
    for part in range(len(norms)):
        norms[part, 0] /= total


def _attend(data: Any) -> None:
    call = carray(data, 1)[0]
    group, size, heads = call.group, call.head_size, call.num_kv_heads
    ends = array_at(call.ends, types.int64, (call.num_rows,))
    paid = array_at(call.paid, types.int64, (call.num_rows,))
    tokens = array_at(call.tokens, types.int64, (call.num_rows,))
    queries = call.scratch + np.int64(thread_index()) * call.scratch_step
    weights = queries + 4 * size * (group + 1)
    lists = weights + 4 * group * PART
    row, start, laid_row, laid_head = 0, 0, -1, -1
    item = count_up(call.taken)
    while item < ends[call.num_rows - 1] * heads:
        while item >= ends[row] * heads:
            start = ends[row] * heads
            row += 1
        parts = ends[row] - start // heads
        head, part = divmod(item - start, parts)
        if laid_row != row or laid_head != head:
            query = call.query + tokens[row] * call.query_row_step
            query += head * group * call.query_head_step
            step, code = call.query_head_step, call.code
            lay_queries(query, step, code, call.scale, group, size, queries)
            laid_row, laid_head = row, head
        num_tiles, num_picked = _list_part(call, row, head, part, lists)
        norms = array_at(call.norms + 8 * item * group, types.float32, (group, 2))
        _weigh(call, queries, lists, num_tiles, weights, norms)
        if paid[row]:
            _keep_weights(call, row, head, part, lists, num_tiles, weights)
        _add_values(
            call, lists, num_picked, weights, call.outputs + 4 * item * group * size
        )
        ended = call.ended + 8 * (row * heads + head)
        if count_up(ended) == parts - 1:
            array_at(ended, types.int64, (1,))[0] = 0
            _put_together(call, row, head, start + head * parts, parts)
        item = count_up(call.taken)


LOOP = Loop(
    _attend,
    [
        *("tokens", "blocks", "num_tokens", "num_masked", "mask_steps", "ends"),
        *("num_rows", "taken", "ended", "norms", "outputs", "scratch", "scratch_step"),
        *("masks", "paid", "cache", "num_kv_heads", "block_size", "itemsize"),
        *("query", "query_row_step", "query_head_step", "group", "head_size"),
        *("output", "output_row_step", "output_head_step", "code"),
    ],
    ["scale", "soft_cap"],
)


class DecodeRows:
    """What decode rows read in a step, the same in all layers.

    Args:
        tokens: [num_rows] each row's index in query and output, int64.
        block_table: [num_rows, max_blocks] block ids of their sequences, int32.
        num_tokens: [num_rows] keys that each attends, at least 1, int64.
        num_masked: [num_rows] first slots that a mask covers, int64; all slots behind
            them are read, and with 0 all slots.
        mask_stride: [num_rows] bytes between the masks of two KV heads, int64; 0 for
            one mask for all heads.
        scored: [num_rows] bool, whose probabilities are wanted.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_table: torch.Tensor,
        num_tokens: np.ndarray,
        num_masked: np.ndarray,
        mask_stride: np.ndarray,
        scored: np.ndarray,
    ) -> None:
        assert block_table.dtype == torch.int32
        assert block_table.stride(1) == 1
        self.tokens, self.block_table, self.num_tokens = tokens, block_table, num_tokens
        self.num_masked, self.mask_stride, self.scored = num_masked, mask_stride, scored
        num_rows = len(tokens)
        blocks = block_table.data_ptr()
        blocks += 4 * block_table.stride(0) * np.arange(num_rows, dtype=np.int64)
        ends = np.cumsum(-(-num_tokens // PART))
        arrays = tokens, blocks, num_tokens, num_masked, mask_stride, ends
        self._num_parts = int(ends[-1]) if num_rows else 0
        # Loops read these by address.
        self._numbers = np.stack([part.astype(np.int64) for part in arrays])
        self.addresses = *(line.ctypes.data for line in self._numbers), num_rows
        self._scored = scored.nonzero()[0].tolist()
        self._nothing_paid = np.zeros(num_rows, np.int64)
        self._scratch: dict[tuple[int, ...], Any] = {}

    def scratch(self, num_kv_heads: int, group: int, head_size: int) -> Any:
        """Addresses of what a call counts with and writes to, kept for all layers."""
        threads = torch.get_num_threads()
        key = threads, num_kv_heads, group, head_size
        if key not in self._scratch:
            items = self._num_parts * num_kv_heads
            counts = torch.zeros(len(self.tokens) * num_kv_heads + 1, dtype=torch.int64)
            of_items = torch.empty(items * group * (head_size + 2), dtype=torch.float32)
            of_thread = 4 * (head_size * (group + 1) + group * PART)
            of_thread += _PICKED_BYTES + _TILES_BYTES + PART
            of_thread = -(-of_thread // 64) * 64
            of_threads = torch.empty(threads * of_thread, dtype=torch.uint8)
            norms = of_items.data_ptr() + 4 * items * group * head_size
            taken = counts.data_ptr()
            numbers = taken, taken + 8, norms, of_items.data_ptr()
            addresses = *numbers, of_threads.data_ptr(), of_thread
            self._scratch[key] = addresses, counts, of_items, of_threads
        addresses, counts, _, _ = self._scratch[key]
        counts[0] = 0
        return addresses

    def paid(self, num_heads: int) -> tuple[np.ndarray, dict[int, torch.Tensor]]:
        """Room for the scored rows' probabilities, and its address for each row."""
        rooms = {
            row: torch.empty(num_heads, int(self.num_tokens[row]), dtype=torch.float32)
            for row in self._scored
        }
        if not rooms:
            return self._nothing_paid, rooms
        addresses = np.zeros(len(self.tokens), np.int64)
        for row, room in rooms.items():
            addresses[row] = room.data_ptr()
        return addresses, rooms


def selected_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: DecodeRows,
    masks: np.ndarray,
    output: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
) -> dict[int, torch.Tensor]:
    """Attend from decode rows to the selected keys of their sequences.

    Values that are not selected are not read, nor are `TILE` keys with none selected.

    Args:
        query: [num_step_tokens, num_heads, head_size].
        kv_cache: as this package describes.
        rows: which tokens attend, and to what.
        masks: [num_rows] addresses of the rows' masks in this layer, of one byte a
            slot, int64; 0 where a row has none.
        output: as query; written where rows has tokens.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.

    Returns:
        [num_heads, num_tokens] attention that each scored row paid, fp32, by the row's
        index in `rows`.
    """
    if len(rows.tokens) == 0:
        return {}
    _, num_heads, head_size = query.shape
    _, num_kv_heads, _, block_elements = kv_cache.shape
    group = num_heads // num_kv_heads
    assert kv_cache.is_contiguous()
    assert query.dtype == output.dtype
    assert query.stride(2) == output.stride(2) == 1
    assert masks.dtype == np.int64
    masks = np.ascontiguousarray(masks)
    paid, probabilities = rows.paid(num_heads)
    itemsize = query.element_size()
    LOOP.run(
        ELEMENTS[kv_cache.dtype],
        *rows.addresses,
        *rows.scratch(num_kv_heads, group, head_size),
        masks.ctypes.data,
        paid.ctypes.data,
        kv_cache.data_ptr(),
        num_kv_heads,
        block_elements // head_size,
        kv_cache.element_size(),
        query.data_ptr(),
        query.stride(0) * itemsize,
        query.stride(1) * itemsize,
        group,
        head_size,
        output.data_ptr(),
        output.stride(0) * itemsize,
        output.stride(1) * itemsize,
        CODES[query.dtype],
        scale,
        soft_cap,
    )
    return probabilities
