"""Scores cached tokens by the attention the last rows of a sequence pay them."""

from __future__ import annotations

import torch

TOKENS_AT_A_TIME = 256
LOGITS_AT_A_TIME = 1 << 20


def attention_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Sum attention probabilities over query rows, for every head and key.

    Probabilities are normalised over every key a row attends to (A-VL section
    "Vision attention"). 256 keys of one KV head are in fp32 at a time, beside the
    logits of its query heads; many rows are taken a part at a time.

    Args:
        query: [num_rows, num_heads, head_size], the last rows of the sequence.
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        blocks: [cdiv(num_tokens, block_size)] block ids of the sequence, int64.
        num_tokens: keys in the sequence; row i attends to the first
            num_tokens - num_rows + 1 + i of them.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.

    Returns:
        [num_heads, num_tokens] fp32.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[1]
    group = num_heads // num_kv_heads
    grouped = query.view(num_rows, num_kv_heads, group, head_size)
    scores = query.new_zeros(num_kv_heads, group, num_tokens, dtype=torch.float32)
    future = _future_keys(num_rows, num_tokens)
    rows_at_a_time = max(LOGITS_AT_A_TIME // (group * num_tokens), 1)
    for first in range(0, num_rows, rows_at_a_time):
        part = grouped[first : first + rows_at_a_time]
        hidden = future[first : first + rows_at_a_time]
        for head in range(num_kv_heads):
            queries = (part[:, head].float() * scale).flatten(0, 1)
            logits = _logits(queries, key_cache[:, head], blocks)[:, :num_tokens]
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.unflatten(0, (len(part), group))
            logits = logits.masked_fill(hidden.unsqueeze(1), -torch.inf)
            scores[head] += logits.softmax(-1).sum(0)
    return scores.flatten(0, 1)


def _logits(
    queries: torch.Tensor, keys: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """[num_queries, len(blocks) · block_size] fp32, for one KV head's keys."""
    block_size = keys.shape[1]
    parts = [
        keys[part].float().flatten(0, 1) @ queries.T
        for part in blocks.split(max(TOKENS_AT_A_TIME // block_size, 1))
    ]
    return torch.cat(parts).T


def _future_keys(num_rows: int, num_tokens: int) -> torch.Tensor:
    """[num_rows, num_tokens], True where a key lies behind its query."""
    rows = torch.arange(num_tokens - num_rows, num_tokens)
    return torch.arange(num_tokens) > rows.unsqueeze(1)
