"""Scores vision tokens by the attention the last prompt rows pay them."""

from __future__ import annotations

import torch

TOKENS_AT_A_TIME = 256


def vision_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    vision_rows: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Sum attention probabilities over query rows and heads, for the vision columns.

    Probabilities are normalised over every key a row attends to (A-VL section
    "Vision attention"; the mean over heads ranks as the sum does). 256 keys of one KV
    head are in fp32 at a time, beside the logits of its query heads.

    Args:
        query: [num_rows, num_heads, head_size], the last rows of the sequence.
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        blocks: [cdiv(num_tokens, block_size)] block ids of the sequence, int64.
        num_tokens: keys in the sequence; row i attends to the first
            num_tokens - num_rows + 1 + i of them.
        vision_rows: [num_vision] positions to score, int64.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.

    Returns:
        [num_vision] fp32.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[1]
    grouped = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    hidden = _future_keys(num_rows, num_tokens)
    scores = torch.zeros(len(vision_rows), dtype=torch.float32, device=query.device)
    for head in range(num_kv_heads):
        queries = (grouped[:, head].float() * scale).flatten(0, 1)
        logits = _logits(queries, key_cache[:, head], blocks)[:, :num_tokens]
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if hidden is not None:
            logits = logits.unflatten(0, (num_rows, -1))
            logits = logits.masked_fill(hidden.unsqueeze(1), -torch.inf).flatten(0, 1)
        scores += logits.softmax(-1).sum(0)[vision_rows]
    return scores


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


def _future_keys(num_rows: int, num_tokens: int) -> torch.Tensor | None:
    """[num_rows, num_tokens], True where a key lies behind its query."""
    if num_rows == 1:
        return None
    rows = torch.arange(num_tokens - num_rows, num_tokens)
    return torch.arange(num_tokens) > rows.unsqueeze(1)
