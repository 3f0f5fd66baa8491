"""Attention of one decode row that also gives its probabilities, in one read."""

from __future__ import annotations

import torch


def scored_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one row to a whole sequence, and return what it looked at.

    Every cached byte is read once: nothing is gathered out of its block first.

    Args:
        query: [num_heads, head_size].
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        value_cache: as key_cache.
        blocks: [cdiv(num_tokens, block_size)] block ids of the sequence, int64.
        num_tokens: keys in the sequence.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.

    Returns:
        output [num_heads, head_size] and probabilities [num_heads, num_tokens], fp32.
    """
    num_kv_heads, block_size, head_size = key_cache.shape[1:]
    queries = query.view(num_kv_heads, -1, head_size).float() * scale
    ids = blocks.tolist()
    logits = queries.new_empty(len(ids), *queries.shape[:2], block_size)
    for logit, block in zip(logits, ids, strict=True):
        torch.bmm(queries, key_cache[block].transpose(1, 2).float(), out=logit)
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    last = num_tokens - (len(ids) - 1) * block_size
    logits[-1, :, :, last:] = -torch.inf
    by_head = logits.permute(1, 2, 0, 3).flatten(2)
    by_block = by_head.softmax(-1).unflatten(2, (len(ids), block_size))
    by_block = by_block.permute(2, 0, 1, 3).contiguous()
    output = torch.zeros_like(queries)
    for weights, block in zip(by_block[:-1], ids[:-1], strict=True):
        output.baddbmm_(weights, value_cache[block].float())
    # Nobody has written the slots behind the sequence: 0 times NaN would be NaN.
    values = value_cache[ids[-1], :, :last].float()
    output.baddbmm_(by_block[-1, :, :, :last], values)
    probabilities = by_block.permute(1, 2, 0, 3).flatten(2)[:, :, :num_tokens]
    return output.flatten(0, 1), probabilities.flatten(0, 1)
