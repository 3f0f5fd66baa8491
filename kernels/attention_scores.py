"""Scores cached tokens by the attention the last rows of a sequence pay them."""

from __future__ import annotations

import torch

TOKENS_AT_A_TIME = 256
LOGITS_BYTES = 4 << 20


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
    logits of its query heads; rows are taken a part at a time where these would need
    more than `LOGITS_BYTES`.

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
    rows_at_a_time = max(LOGITS_BYTES // (4 * group * num_tokens), 1)
    for first in range(0, num_rows, rows_at_a_time):
        part = grouped[first : first + rows_at_a_time].float() * scale
        num_seen = num_tokens - num_rows + 1 + first
        for head in range(num_kv_heads):
            keys = key_cache[:, head]
            logits = _logits(part[:, head], keys, blocks, num_tokens)
            if soft_cap:
                logits.div_(soft_cap).tanh_().mul_(soft_cap)
            _hide_future(logits, num_seen)
            scores[head] += _softmax_(logits).sum(0)
            del logits  # before the next head's are made
    return scores.flatten(0, 1)


def _logits(
    queries: torch.Tensor, keys: torch.Tensor, blocks: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """[num_rows, group, num_tokens] fp32, for one KV head's keys."""
    logits = queries.new_empty(*queries.shape[:2], num_tokens)
    first = 0
    for part in blocks.split(max(TOKENS_AT_A_TIME // keys.shape[1], 1)):
        rows = keys[part].float().flatten(0, 1)[: num_tokens - first]
        logits[:, :, first : first + len(rows)] = queries @ rows.T
        first += len(rows)
    return logits


def _hide_future(logits: torch.Tensor, num_seen: int) -> None:
    """Take keys behind a query's own out of [num_rows, group, num_tokens] logits.

    The first row attends to `num_seen` keys, each further row to one more.
    """
    for row, logit in enumerate(logits):
        logit[:, num_seen + row :] = -torch.inf


def _softmax_(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension, in place: the logits may be large."""
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(-1, keepdim=True))
