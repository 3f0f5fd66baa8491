"""Moves cache rows inside a request's own blocks."""

from __future__ import annotations

import torch

ROWS_AT_A_TIME = 256


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """Copy the rows at positions `source` to positions `target`, in place.

    Source and target may overlap: then one cache is read whole before it is written, so
    the transient memory is the moved rows of the keys or of the values. Else it is
    256 rows.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        value_cache: as key_cache.
        blocks: [num_request_blocks] block ids of the request, int64.
        source: [num_moved] positions in the request, int64.
        target: [num_moved] positions in the request, distinct in a head, int64.
        heads: [num_moved] KV head of each move, int64; None moves all heads alike.
    """
    num_kv_heads, block_size = key_cache.shape[1:3]
    rows_at_a_time = ROWS_AT_A_TIME * (1 if heads is None else num_kv_heads)
    if torch.isin(target, source).any():
        rows_at_a_time = len(source)
    for first in range(0, len(source), rows_at_a_time):
        part = slice(first, first + rows_at_a_time)
        head = slice(None) if heads is None else heads[part]
        old = blocks[source[part] // block_size], head, source[part] % block_size
        new = blocks[target[part] // block_size], head, target[part] % block_size
        for cache in (key_cache, value_cache):
            cache[new] = cache[old]
