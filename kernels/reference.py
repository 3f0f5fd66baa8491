"""The oracle of every kernel: obvious code, one loop a sentence of the definition."""

from __future__ import annotations

import torch


def attention_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """As `kernels.attention_scores`, in the precision of `query`."""
    num_rows, num_heads, _ = query.shape
    group = num_heads // key_cache.shape[1]
    scores = torch.zeros(num_heads, num_tokens, dtype=query.dtype)
    keys = _rows(key_cache, blocks, num_tokens).to(query.dtype)
    for row in range(num_rows):
        visible = num_tokens - num_rows + 1 + row
        for head in range(num_heads):
            seen = keys[:visible, head // group]
            scores[head, :visible] += _attend(query[row, head], seen, scale, soft_cap)
    return scores


def scored_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.scored_attention`, in the precision of `query`."""
    num_heads, _ = query.shape
    group = num_heads // key_cache.shape[1]
    keys = _rows(key_cache, blocks, num_tokens).to(query.dtype)
    values = _rows(value_cache, blocks, num_tokens).to(query.dtype)
    output = torch.zeros_like(query)
    probabilities = torch.zeros(num_heads, num_tokens, dtype=query.dtype)
    for head in range(num_heads):
        seen = keys[:, head // group]
        probabilities[head] = _attend(query[head], seen, scale, soft_cap)
        output[head] = probabilities[head] @ values[:, head // group]
    return output, probabilities


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """As `kernels.compact_blocks`."""
    block_size = key_cache.shape[2]
    moved = [slice(None)] * len(source) if heads is None else heads.tolist()
    for cache in (key_cache, value_cache):
        before = cache.clone()
        for old, new, head in zip(source.tolist(), target.tolist(), moved, strict=True):
            row = before[blocks[old // block_size], head, old % block_size]
            cache[blocks[new // block_size], head, new % block_size] = row


def exchange_rows(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """As `kernels.exchange_rows`."""
    both = torch.cat([source, target]), torch.cat([target, source])
    twice = None if heads is None else heads.repeat(2)
    compact_blocks(key_cache, value_cache, blocks, *both, twice)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    """[num_keys] attention probabilities of one row and head."""
    logits = keys @ query * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return torch.exp(logits - torch.logsumexp(logits, 0))


def _rows(cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_tokens, num_kv_heads, head_size] of one sequence."""
    return cache[blocks].transpose(1, 2).flatten(0, 1)[:num_tokens]
