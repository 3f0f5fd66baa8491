"""Chooses core anew for those requests of a step that ask for it, in one launch."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_avl.kernels.cuda.ranking import (
    BLOCK_N,
    NUM_WARPS,
    cache_rows,
    count,
    is_best,
    key_of,
    last_of_best,
)


@triton.jit(do_not_specialize_on_alignment=["block_table_ptr"])
def _select_core_kernel(
    scores_ptr,  # [num_heads, num_blocks * block_size] fp32
    keys_ptr,  # the first row of scores as int32
    row_tokens_ptr,  # [num_blocks * block_size]
    core_list_ptr,  # [num_lists, num_blocks * block_size]
    num_entered_ptr,  # [1]
    block_table_ptr,  # [num_reqs, max_blocks]
    stop_ptr,  # [num_reqs]
    num_listed_ptr,  # [num_reqs]
    scores_stride,
    list_stride,
    table_stride,
    num_heads: tl.constexpr,
    num_lists: tl.constexpr,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
):
    # One request in one layer.
    request = tl.program_id(0).to(tl.int64)
    num_listed = tl.load(num_listed_ptr + request)
    if num_listed == 0:
        return
    stop = tl.load(stop_ptr + request)
    blocks_ptr = block_table_ptr + request * table_stride

    num_fixed = tl.zeros([], tl.int32)
    for first in range(0, stop, block_n):
        slot = first + tl.arange(0, block_n)
        exists = slot < stop
        row = cache_rows(blocks_ptr, slot, exists, block_size)
        token = tl.load(row_tokens_ptr + row, mask=exists, other=-1)
        score = tl.zeros([block_n], tl.float32)
        of_head_ptr = scores_ptr
        for _ in range(num_heads):
            score += tl.load(of_head_ptr + row, mask=exists, other=0.0)
            of_head_ptr += scores_stride
        # No thread reads what another writes: a key takes its own row's place.
        tl.store(keys_ptr + row, key_of(score, token >= 0), mask=exists)
        num_fixed += count(exists & (token < 0))
    tl.debug_barrier()
    last_key, last_position = last_of_best(
        keys_ptr,
        row_tokens_ptr,
        blocks_ptr,
        0,
        stop,
        num_listed - num_fixed,
        block_size,
        block_n,
    )
    tl.debug_barrier()

    place = tl.zeros([], tl.int32)
    num_entered = tl.zeros([], tl.int32)
    for first in range(0, stop, block_n):
        slot = first + tl.arange(0, block_n)
        exists = slot < stop
        row = cache_rows(blocks_ptr, slot, exists, block_size)
        token = tl.load(row_tokens_ptr + row, mask=exists, other=-1)
        key = tl.load(keys_ptr + row, mask=exists, other=-1)
        competes = token >= 0
        chosen = competes & is_best(key, token >> 1, last_key, last_position)
        num_entered += count(chosen & ((token & 1) == 0))
        token = tl.where(chosen, token | 1, token & ~1)
        tl.store(row_tokens_ptr + row, token, mask=exists & competes)
        listed = (exists & (chosen | ~competes)).to(tl.int32)
        entry = place + tl.cumsum(listed, 0) - 1
        entry = cache_rows(blocks_ptr, entry, listed != 0, block_size)
        entry_ptr = core_list_ptr + entry
        for _ in range(num_lists):
            tl.store(entry_ptr, slot, mask=listed != 0)
            entry_ptr += list_stride
        place += count(listed != 0)
    tl.atomic_add(num_entered_ptr, num_entered, sem="relaxed")


def select_core(
    scores: torch.Tensor,
    row_tokens: torch.Tensor,
    core_list: torch.Tensor,
    num_entered: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    stop: torch.Tensor,
    num_listed: torch.Tensor,
) -> None:
    """List the most scored of the stored rows of some requests as core.

    Scores of all heads are added. Of equal scores the lower position wins; NaN is the
    lowest. The launch depends on shapes alone: a CUDA graph may hold it.

    Args:
        scores: [num_heads, num_blocks * block_size] fp32, not negative, by cache row.
            The first row is used up where a request is looked at.
        row_tokens: [num_blocks * block_size] int32, updated. At a stored slot's cache
            row: twice its token's position, and 1 more where it is core; the
            position's complement where it does not compete.
        core_list: [num_lists, num_blocks * block_size] int32, written anew, all lists
            alike. Entry i, at the cache row of slot i, is the i-th slot, ascending,
            that holds core or what does not compete.
        num_entered: [1] int32; rows are added that had not been core before.
        block_table: [num_reqs, max_blocks] int32, blocks of what is stored.
        block_size: slots of a block.
        stop: [num_reqs] int32, slot behind the last that is listed or competes.
        num_listed: [num_reqs] int32, entries of the new list; 0 leaves a request alone.
    """
    assert scores.stride(1) == 1
    _select_core_kernel[len(num_listed),](
        scores,
        scores.view(torch.int32),
        row_tokens,
        core_list,
        num_entered,
        block_table,
        stop,
        num_listed,
        scores.stride(0),
        core_list.stride(0),
        block_table.stride(0),
        num_heads=len(scores),
        num_lists=len(core_list),
        block_size=block_size,
        block_n=BLOCK_N,
        num_warps=NUM_WARPS,
    )
