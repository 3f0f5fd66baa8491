"""Chooses the vision rows that stay and moves them into the stored tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_avl.backend.view import Compaction
from vllm_avl.kernels import compact_blocks, vision_scores
from vllm_avl.plan import Plan

AllReduce = Callable[[torch.Tensor], torch.Tensor]


def compact_layer(
    compactions: Sequence[Compaction],
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
    soft_cap: float,
    all_reduce: AllReduce,
) -> None:
    """Evict the minor vision rows of one layer, for every request that compacts.

    Call after the layer's attention. All ranks of a tensor-parallel group rank the
    same sums and keep the same rows.

    Args:
        compactions: who compacts in this step.
        query: [num_tokens, num_heads, head_size] of the step.
        key_cache: [num_blocks, num_kv_heads, block_size, head_size] view.
        value_cache: as key_cache.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.
        all_reduce: sums a tensor over the tensor-parallel ranks.
    """
    scores = [
        vision_scores(
            query[c.query_end - c.plan.num_scoring_rows : c.query_end],
            key_cache,
            c.blocks,
            c.plan.num_prompt_tokens,
            c.vision_rows,
            scale,
            soft_cap,
        )
        for c in compactions
    ]
    totals = all_reduce(torch.cat(scores)).split([len(s) for s in scores])
    for compaction, total in zip(compactions, totals, strict=True):
        source, target = moves(compaction.plan, compaction.vision_rows, total)
        compact_blocks(key_cache, value_cache, compaction.blocks, source, target)


def moves(
    plan: Plan, vision_rows: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair the kept rows of the freed head with the holes of the stored tail.

    Row order inside the tail is free (RoPE is inside the cached keys), so a kept row
    that is there already stays where it is.

    Args:
        plan: the request's plan.
        vision_rows: [num_vision] positions.
        scores: [num_vision]; higher stays, of equal ones the lower position.

    Returns:
        source and target positions, each [num_moved] int64.
    """
    num_full_tokens = plan.num_full_blocks * plan.block_size
    ranking = torch.sort(scores, descending=True, stable=True).indices
    kept = torch.ones(num_full_tokens, dtype=torch.bool)
    kept[vision_rows[ranking[plan.num_stored_vision :]]] = False
    source = kept[: plan.num_freed_tokens].nonzero().flatten()
    holes = (~kept[plan.num_freed_tokens :]).nonzero().flatten()
    return source, holes + plan.num_freed_tokens
