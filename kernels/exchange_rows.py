"""Lets cache rows of a request change places."""

from __future__ import annotations

import torch

ROWS_AT_A_TIME = 256


def exchange_rows(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """Exchange the rows at positions `source` with those at `target`, in place.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], any strides.
        value_cache: as key_cache.
        blocks: [num_request_blocks] block ids of the request, int64.
        source: [num_pairs] positions in the request, int64.
        target: as source; all positions of a head are distinct.
        heads: [num_pairs] KV head of each pair, int64; None moves all heads alike.
    """
    num_kv_heads, block_size = key_cache.shape[1:3]
    rows_at_a_time = ROWS_AT_A_TIME * (1 if heads is None else num_kv_heads)
    for first in range(0, len(source), rows_at_a_time):
        part = slice(first, first + rows_at_a_time)
        head = slice(None) if heads is None else heads[part]
        one = blocks[source[part] // block_size], head, source[part] % block_size
        other = blocks[target[part] // block_size], head, target[part] % block_size
        for cache in (key_cache, value_cache):
            cache[one], cache[other] = cache[other], cache[one]
