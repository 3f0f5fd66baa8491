"""The oracle of every kernel: obvious code, one loop a sentence of the definition."""

from __future__ import annotations

import torch


def vision_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    vision_rows: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """As `kernels.vision_scores`, in the precision of `query`."""
    num_rows, num_heads, _ = query.shape
    group = num_heads // key_cache.shape[1]
    scores = torch.zeros(len(vision_rows), dtype=query.dtype)
    keys = _rows(key_cache, blocks, num_tokens).to(query.dtype)
    for row in range(num_rows):
        visible = num_tokens - num_rows + 1 + row
        for head in range(num_heads):
            logits = keys[:visible, head // group] @ query[row, head] * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            attention = torch.zeros(num_tokens, dtype=query.dtype)
            attention[:visible] = torch.exp(logits - torch.logsumexp(logits, 0))
            scores += attention[vision_rows]
    return scores


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """As `kernels.compact_blocks`."""
    block_size = key_cache.shape[2]
    for cache in (key_cache, value_cache):
        before = cache.clone()
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            row = before[blocks[old // block_size], :, old % block_size]
            cache[blocks[new // block_size], :, new % block_size] = row


def _rows(cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_tokens, num_kv_heads, head_size] of one sequence."""
    return cache[blocks].transpose(1, 2).flatten(0, 1)[:num_tokens]
