"""Moves cache rows inside a request's own blocks."""

from __future__ import annotations

import torch


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Copy the rows at positions `source` to positions `target`, in place.

    Source and target may overlap: one cache is read whole before it is written, so the
    transient memory is the moved rows of the keys or of the values.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        value_cache: as key_cache.
        blocks: [num_request_blocks] block ids of the request, int64.
        source: [num_moved] positions in the request, int64.
        target: [num_moved] positions in the request, distinct, int64.
    """
    block_size = key_cache.shape[2]
    source_blocks, source_slots = blocks[source // block_size], source % block_size
    target_blocks, target_slots = blocks[target // block_size], target % block_size
    for cache in (key_cache, value_cache):
        rows = cache[source_blocks, :, source_slots]
        cache[target_blocks, :, target_slots] = rows
