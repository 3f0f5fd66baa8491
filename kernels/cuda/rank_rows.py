"""Chooses what of a prompt is stored, and what of that is core, in one launch."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_avl.kernels.cuda.ranking import (
    BLOCK_N,
    NUM_WARPS,
    count,
    is_best,
    key_of,
    last_of_best,
)


@triton.jit(do_not_specialize=["num_candidates", "num_stored", "num_core"])
def _rank_rows_kernel(
    chosen_ptr,  # [num_rankings, num_stored]
    keys_ptr,  # [num_rankings, num_candidates] scratch
    scores_ptr,  # [num_rankings, num_candidates] fp32
    core_scores_ptr,  # [num_rankings, num_candidates] fp32
    num_candidates,
    num_stored,
    num_core,
    block_n: tl.constexpr,
):
    # One ranking of one request in one layer.
    ranking = tl.program_id(0).to(tl.int64)
    chosen_ptr += ranking * num_stored
    keys_ptr += ranking * num_candidates
    scores_ptr += ranking * num_candidates
    core_scores_ptr += ranking * num_candidates
    for first in range(0, num_candidates, block_n):
        candidate = first + tl.arange(0, block_n)
        exists = candidate < num_candidates
        score = tl.load(scores_ptr + candidate, mask=exists, other=0.0)
        tl.store(keys_ptr + candidate, key_of(score, exists), mask=exists)
    tl.debug_barrier()
    stored_key, stored_position = last_of_best(
        keys_ptr, None, None, 0, num_candidates, num_stored, 1, block_n
    )
    tl.debug_barrier()
    for first in range(0, num_candidates, block_n):
        candidate = first + tl.arange(0, block_n)
        exists = candidate < num_candidates
        key = tl.load(keys_ptr + candidate, mask=exists, other=-1)
        stays = exists & is_best(key, candidate, stored_key, stored_position)
        score = tl.load(core_scores_ptr + candidate, mask=exists, other=0.0)
        # No thread reads what another writes: a key takes its own place.
        tl.store(keys_ptr + candidate, key_of(score, stays), mask=exists)
    tl.debug_barrier()
    core_key, core_position = last_of_best(
        keys_ptr, None, None, 0, num_candidates, num_core, 1, block_n
    )
    core_place = tl.zeros([], tl.int32)
    other_place = num_core + tl.zeros([], tl.int32)
    for first in range(0, num_candidates, block_n):
        candidate = first + tl.arange(0, block_n)
        exists = candidate < num_candidates
        key = tl.load(keys_ptr + candidate, mask=exists, other=-1)
        stays = key >= 0
        in_core = stays & is_best(key, candidate, core_key, core_position)
        other = stays & ~in_core
        place = core_place + tl.cumsum(in_core.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + place, candidate, mask=in_core)
        place = other_place + tl.cumsum(other.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + place, candidate, mask=other)
        core_place += count(in_core)
        other_place += count(other)


def rank_rows(
    scores: torch.Tensor,
    core_scores: torch.Tensor,
    num_stored: int,
    num_core: int,
) -> torch.Tensor:
    """Find the candidates that stay, those of core in front.

    Of equal scores the lower candidate wins; NaN is the lowest score (A-VL section
    "Vision attention").

    Args:
        scores: [num_rankings, num_candidates] fp32, not negative: which of them stay.
        core_scores: as scores: which of those are core.
        num_stored: candidates that stay.
        num_core: of these, how many are core.

    Returns:
        [num_rankings, num_stored] int32 candidates: num_core of core, then the others,
        both ascending.
    """
    scores, core_scores = scores.contiguous(), core_scores.contiguous()
    num_rankings, num_candidates = scores.shape
    chosen = scores.new_empty((num_rankings, num_stored), dtype=torch.int32)
    keys = torch.empty_like(scores, dtype=torch.int32)
    _rank_rows_kernel[num_rankings,](
        chosen,
        keys,
        scores,
        core_scores,
        num_candidates,
        num_stored,
        num_core,
        block_n=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return chosen
