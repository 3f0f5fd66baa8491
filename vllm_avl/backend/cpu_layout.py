"""How vLLM's CPU kernel lays a block out, as strided views of rows."""

from __future__ import annotations

import torch

KEYS_BY_COLUMN = ("vec", "vec16")
"""Instruction sets of vLLM's kernel whose keys lie `[head_size, block_size]`."""


def split_cache(
    kv_cache: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """View keys and values of a layer's cache as rows.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 · head_size], a block's keys
            by column, then its values by row.
        head_size: elements a row holds.

    Returns:
        two views [num_blocks, num_kv_heads, block_size, head_size].
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * head_size)
    keys = halves[:, :, 0].unflatten(-1, (head_size, block_size))
    values = halves[:, :, 1].unflatten(-1, (block_size, head_size))
    return keys.transpose(-1, -2), values
