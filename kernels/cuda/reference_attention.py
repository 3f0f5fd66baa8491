"""The oracle of selected attention: obvious code, one loop a sentence of the rule."""

from __future__ import annotations

import math

import torch
from vllm_avl.kernels.cuda.selected_attention import Refresh


def selected_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    first_slot: torch.Tensor,
    core_list: torch.Tensor,
    num_core: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    *,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    max_query_len: int = 1,
    num_splits: int = 1,
    partial: tuple[torch.Tensor, torch.Tensor] | None = None,
    refresh: Refresh | None = None,
) -> None:
    """As `selected_attention.selected_attention`, in the precision of `query`."""
    group = query.shape[1] // key_cache.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    for request, blocks in enumerate(block_table):
        first, stop = query_start_loc[request : request + 2].tolist()
        for token in range(first, stop):
            entries = torch.arange(int(num_core[request]), device=blocks.device)
            tail_end = int(seq_lens[request]) - (stop - 1 - token)
            tail = torch.arange(
                int(first_slot[request]), tail_end, device=blocks.device
            )
            for head in range(query.shape[1]):
                kv_head = head // group
                keys, values = key_cache[:, kv_head], value_cache[:, kv_head]
                ranking = core_list[min(kv_head, len(core_list) - 1)]
                core = ranking[_cache_rows(entries, blocks, keys)]
                rows = _cache_rows(torch.cat([core, tail]), blocks, keys)
                logits = _read(keys, rows, k_scale, query) @ query[token, head] * scale
                if soft_cap:
                    logits = soft_cap * torch.tanh(logits / soft_cap)
                total = torch.logsumexp(logits, 0)
                probabilities = torch.exp(logits - total)
                output[token, head] = probabilities @ _read(
                    values, rows, v_scale, query
                )
                if lse is not None:
                    lse[token, head] = total / math.log(2)
                if refresh and token == stop - int(refresh.scored[request]):
                    if head % group == 0:
                        refresh.scores[kv_head, rows] = 0
                    refresh.scores[kv_head, rows] += probabilities.to(wide)


def _cache_rows(
    slots: torch.Tensor, blocks: torch.Tensor, cache: torch.Tensor
) -> torch.Tensor:
    """Where a request's slots lie in one KV head's cache, flattened to rows."""
    block_size = cache.shape[1]
    return blocks[slots // block_size].long() * block_size + slots % block_size


def _read(
    cache: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
    like: torch.Tensor,
) -> torch.Tensor:
    """[num_rows, head_size] of one KV head, in the precision of `like`."""
    block_size = cache.shape[1]
    found = cache[rows // block_size, rows % block_size].to(like.dtype)
    return found if scale is None else found * scale.to(like.dtype)
