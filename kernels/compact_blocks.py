"""Moves cache rows inside a request's own blocks."""

from __future__ import annotations

import torch


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """Copy the rows at positions `source` to positions `target`, in place.

    Source and target may overlap: one cache is read whole before it is written, so the
    transient memory is the moved rows of the keys or of the values.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        value_cache: as key_cache.
        blocks: [num_request_blocks] block ids of the request, int64.
        source: [num_moved] positions in the request, int64.
        target: [num_moved] positions in the request, distinct in a head, int64.
        heads: [num_moved] KV head of each move, int64; None moves all heads alike.
    """
    block_size = key_cache.shape[2]
    head = slice(None) if heads is None else heads
    old = blocks[source // block_size], head, source % block_size
    new = blocks[target // block_size], head, target % block_size
    for cache in (key_cache, value_cache):
        cache[new] = cache[old]
