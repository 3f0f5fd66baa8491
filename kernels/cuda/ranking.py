"""Finds the best of a request's rows inside a kernel: no sort, no scratch but keys.

Rows compete by key, of equal keys by position. A key is an integer in the order of a
score, so that the last of the best can be found four bits at a time.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

HIGHEST = tl.constexpr(0x7FFFFFFE)
BLOCK_N = 2048
"""Slots that a program looks at at a time."""
NUM_WARPS = 16


@triton.jit
def key_of(score, competes):
    """Keys of scores, which are not negative; NaN is the lowest, -1 out of the race."""
    key = tl.where(score == score, score.to(tl.int32, bitcast=True) + 1, 0)
    return tl.where(competes, key, -1)


@triton.jit
def count(mask, axis: tl.constexpr = 0):
    """How many are True; below 2 ** 24."""
    # The compiler would pack sums of bits into bytes, in local memory.
    return tl.sum(tl.where(mask, 1.0, 0.0), axis).to(tl.int32)


@triton.jit
def cache_rows(blocks_ptr, slot, exists, block_size: tl.constexpr):
    """Rows of the cache, int64, where slots of a request lie."""
    block = tl.load(blocks_ptr + slot // block_size, mask=exists, other=0)
    return block.to(tl.int64) * block_size + slot % block_size


@triton.jit
def _slots(blocks_ptr, first, stop, block_size: tl.constexpr, block_n: tl.constexpr):
    # Slots from first on, whether they exist, and where their keys lie.
    slot = first + tl.arange(0, block_n)
    exists = slot < stop
    row = slot.to(tl.int64)
    if blocks_ptr is not None:
        row = cache_rows(blocks_ptr, slot, exists, block_size)
    return slot, exists, row


@triton.jit
def _keys_at(
    keys_ptr, positions_ptr, row, slot, exists, tied_key, by_position: tl.constexpr
):
    key = tl.load(keys_ptr + row, mask=exists, other=-1)
    if by_position:
        position = slot
        if positions_ptr is not None:
            position = tl.load(positions_ptr + row, mask=exists, other=0) >> 1
        key = tl.where(key == tied_key, HIGHEST - position, -1)
    return key


@triton.jit
def _key_at_rank(
    keys_ptr,
    positions_ptr,
    blocks_ptr,
    first_slot,
    stop,
    rank,
    tied_key,
    by_position: tl.constexpr,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
):
    # The rank-th largest key; more than any where rank is 0.
    digit = tl.arange(0, 16)
    found = tl.zeros([], tl.int32)
    for place in range(8):
        shift = 28 - 4 * place
        # The sign is no digit: no key reaches what it would make.
        trial = tl.where((digit << shift) < 0, HIGHEST + 1, found + (digit << shift))
        reached = tl.zeros([16], tl.int32)
        for first in range(first_slot, stop, block_n):
            slot, exists, row = _slots(blocks_ptr, first, stop, block_size, block_n)
            key = _keys_at(
                keys_ptr, positions_ptr, row, slot, exists, tied_key, by_position
            )
            reached += count(key[None, :] >= trial[:, None], 1)
        found += (count(reached >= rank) - 1) << shift
    return tl.where(rank > 0, found, HIGHEST + 1)


@triton.jit
def last_of_best(
    keys_ptr,  # [num_slots] int32 of slots, or of cache rows where blocks are given
    positions_ptr,  # as keys: twice a slot's position; None where it is the slot's own
    blocks_ptr,  # [num_request_blocks] or None
    first_slot,
    stop,
    num_best,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
):
    """Key and position of the last of the num_best best of slots [first_slot, stop)."""
    key = _key_at_rank(
        keys_ptr,
        positions_ptr,
        blocks_ptr,
        first_slot,
        stop,
        num_best,
        0,
        False,
        block_size,
        block_n,
    )
    num_above = tl.zeros([], tl.int32)
    num_equal = tl.zeros([], tl.int32)
    for first in range(first_slot, stop, block_n):
        _, exists, row = _slots(blocks_ptr, first, stop, block_size, block_n)
        other = tl.load(keys_ptr + row, mask=exists, other=-1)
        num_above += count(other > key)
        num_equal += count(other == key)
    position = tl.full([], HIGHEST, tl.int32)
    if num_equal > num_best - num_above:
        position = HIGHEST - _key_at_rank(
            keys_ptr,
            positions_ptr,
            blocks_ptr,
            first_slot,
            stop,
            num_best - num_above,
            key,
            True,
            block_size,
            block_n,
        )
    return key, position


@triton.jit
def is_best(key, position, last_key, last_position):
    """Whether rows are among the best, whose last is given."""
    return (key > last_key) | ((key == last_key) & (position <= last_position))
