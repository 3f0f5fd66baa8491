"""Scores cached tokens by the attention the last rows of a sequence pay them."""

from __future__ import annotations

from functools import partial

import torch

TOKENS_AT_A_TIME = 128


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
    "Vision attention"). The keys of a KV head are read twice, `TOKENS_AT_A_TIME` in
    fp32 at a time: what is held beside the scores does not grow with the sequence.

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
    num_rows, num_heads, _ = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    scores = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    by_head = scores.view(num_kv_heads, -1, num_tokens)
    grouped = query.view(num_rows, *by_head.shape[:2], -1)
    step = max(TOKENS_AT_A_TIME // block_size, 1)
    firsts = range(0, num_tokens, step * block_size)
    for head in range(num_kv_heads):
        logits = partial(
            _logits,
            grouped[:, head].float() * scale,
            key_cache[:, head],
            num_tokens,
            soft_cap,
        )
        norm = torch.tensor(-torch.inf)
        for first, ids in zip(firsts, blocks.split(step), strict=True):
            total = logits(ids, first).logsumexp(-1, keepdim=True)
            norm = torch.logaddexp(norm, total)
        for first, ids in zip(firsts, blocks.split(step), strict=True):
            paid = logits(ids, first).sub_(norm).exp_().sum(0)
            by_head[head, :, first : first + paid.shape[-1]] = paid
    return scores


def _logits(
    rows: torch.Tensor,
    keys: torch.Tensor,
    num_tokens: int,
    soft_cap: float,
    ids: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """[num_rows, group, num_keys] logits of the keys in blocks `ids`, from `first` on.

    They are -inf where a key lies behind the row, of [num_rows, group, head_size].
    """
    logits = rows @ keys[ids].flatten(0, 1)[: num_tokens - first].float().T
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    num_seen = num_tokens - len(rows) + 1 - first
    if num_seen < logits.shape[-1]:
        for row, logit in enumerate(logits):
            logit[:, max(num_seen + row, 0) :] = -torch.inf
    return logits
