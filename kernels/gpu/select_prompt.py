"""Chooses what of a prompt is stored and what of that is core, in one launch."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_avl.kernels.gpu.ranking import (
    BLOCK_N,
    NUM_WARPS,
    cache_rows,
    count,
    is_best,
    key_of,
    last_of_best,
)


@triton.jit(
    do_not_specialize=["num_stored", "num_core", "num_moves"],
    do_not_specialize_on_alignment=["blocks_ptr"],
)
def _select_prompt_kernel(
    source_ptr,  # [num_moves]
    target_ptr,  # [num_moves]
    keys_ptr,  # [num_slots] scratch
    scores_ptr,  # [num_slots] fp32
    competes_ptr,  # [num_slots]
    blocks_ptr,  # [num_request_blocks]
    row_tokens_ptr,  # [num_blocks * block_size] or None
    core_list_ptr,  # [num_blocks * block_size] or None
    num_slots,
    start,
    num_stored,
    num_core,
    num_moves,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
):
    # One program: the whole prompt of one request in one layer.
    for first in range(0, num_slots, block_n):
        slot = first + tl.arange(0, block_n)
        exists = slot < num_slots
        score = tl.load(scores_ptr + slot, mask=exists, other=0.0)
        competes = tl.load(competes_ptr + slot, mask=exists, other=0) != 0
        tl.store(keys_ptr + slot, key_of(score, competes), mask=exists)
    tl.debug_barrier()
    stored_key, stored_position = last_of_best(
        keys_ptr, None, None, 0, num_slots, num_stored, block_size, block_n
    )
    core_key, core_position = stored_key, stored_position
    if core_list_ptr is not None:
        core_key, core_position = last_of_best(
            keys_ptr, None, None, 0, num_slots, num_core, block_size, block_n
        )

    # What stays in the tail, and the holes in it.
    num_holes = tl.zeros([], tl.int32)
    for first in range(start, num_slots, block_n):
        slot = first + tl.arange(0, block_n)
        exists = slot < num_slots
        key = tl.load(keys_ptr + slot, mask=exists, other=-1)
        stays = (key < 0) | is_best(key, slot, stored_key, stored_position)
        hole = (exists & ~stays).to(tl.int32)
        place = num_holes + tl.cumsum(hole, 0) - 1
        tl.store(target_ptr + place, slot, mask=hole != 0)
        num_holes += count(hole != 0)
        if row_tokens_ptr is not None:
            row = cache_rows(blocks_ptr, slot, exists, block_size)
            in_core = is_best(key, slot, core_key, core_position)
            token = tl.where(in_core, 2 * slot + 1, 2 * slot)
            token = tl.where(key < 0, ~slot, token)
            tl.store(row_tokens_ptr + row, token, mask=exists & stays)
    tl.debug_barrier()

    # What stays of the head moves into them.
    num_moved = tl.zeros([], tl.int32)
    for first in range(0, start, block_n):
        slot = first + tl.arange(0, block_n)
        exists = slot < start
        key = tl.load(keys_ptr + slot, mask=exists, other=-1)
        stays = (key < 0) | is_best(key, slot, stored_key, stored_position)
        moves = exists & stays
        place = num_moved + tl.cumsum(moves.to(tl.int32), 0) - 1
        tl.store(source_ptr + place, slot, mask=moves)
        num_moved += count(moves)
        if row_tokens_ptr is not None:
            target = tl.load(target_ptr + place, mask=moves, other=0)
            row = cache_rows(blocks_ptr, target, moves, block_size)
            in_core = is_best(key, slot, core_key, core_position)
            token = tl.where(in_core, 2 * slot + 1, 2 * slot)
            token = tl.where(key < 0, ~slot, token)
            tl.store(row_tokens_ptr + row, token, mask=moves)
    for first in range(num_moved, num_moves, block_n):
        place = first + tl.arange(0, block_n)
        tl.store(source_ptr + place, -1, mask=place < num_moves)

    if core_list_ptr is not None:
        tl.debug_barrier()
        num_listed = tl.zeros([], tl.int32)
        for first in range(start, num_slots, block_n):
            slot = first + tl.arange(0, block_n)
            exists = slot < num_slots
            row = cache_rows(blocks_ptr, slot, exists, block_size)
            token = tl.load(row_tokens_ptr + row, mask=exists, other=0)
            listed = exists & ((token < 0) | ((token & 1) != 0))
            place = start + num_listed + tl.cumsum(listed.to(tl.int32), 0) - 1
            entry = cache_rows(blocks_ptr, place, listed, block_size)
            tl.store(core_list_ptr + entry, slot, mask=listed)
            num_listed += count(listed)


def select_prompt(
    scores: torch.Tensor,
    competes: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
    start: int,
    num_stored: int,
    num_core: int = 0,
    row_tokens: torch.Tensor | None = None,
    core_list: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evict the least scored tokens of a prompt, and list the most scored as core.

    Of equal scores the lower position wins; NaN is the lowest score (A-VL section
    "Vision attention").

    Args:
        scores: [num_slots] fp32, not negative, of the tokens of the full prompt blocks.
        competes: [num_slots] bool; what does not compete is stored and read always.
        blocks: [num_request_blocks] block ids of the request, int32 or int64.
        block_size: slots of a block.
        start: first slot that stays; as many competitors go as slots lie before it.
        num_stored: competitors that stay.
        num_core: of these, how many are core.
        row_tokens: [num_blocks * block_size] int32. At the cache rows of the slots
            that stay: twice the token's position, and 1 more where it is core; the
            position's complement where it does not compete. None where there is no
            core.
        core_list: as row_tokens. Entry i, at the cache row of slot start + i, is the
            i-th slot, ascending, that holds core or what does not compete.

    Returns:
        source and target, [num_moves] int32 slots: rows in front of `start` that stay,
        and the slots that they move to; -1 is padding, in source alone.
    """
    assert scores.is_contiguous()
    assert competes.is_contiguous()
    assert (row_tokens is None) == (core_list is None)
    num_slots = len(competes)
    num_moves = min(start, num_slots - start)
    scratch = torch.empty(
        num_slots + 2 * num_moves, dtype=torch.int32, device=scores.device
    )
    source, target, keys = scratch.split([num_moves, num_moves, num_slots])
    _select_prompt_kernel[1,](
        source,
        target,
        keys,
        scores,
        competes,
        blocks,
        row_tokens,
        core_list,
        num_slots,
        start,
        num_stored,
        num_core,
        num_moves,
        block_size=block_size,
        block_n=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return source, target
