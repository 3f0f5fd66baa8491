"""Reads rows out of a cache, in plain torch: few policies ask, once a prompt."""

from __future__ import annotations

import torch

SLOTS, ELEMENTS = 16, 16
"""Of a line of packed keys, and of packed values; see `packed.py`."""


def read_rows(
    kv_cache: torch.Tensor,
    head_size: int,
    blocks: torch.Tensor,
    slots: torch.Tensor,
    *,
    packed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_kv_heads, num_slots, head_size] keys and values of a sequence, fp32.

    Args:
        kv_cache: see `kernels.cpu`.
        head_size: elements of a key.
        blocks: [num_blocks] block ids of the sequence.
        slots: [num_slots] of these blocks, int64.
        packed: whether rows lie in pairs.
    """
    keys, values = kv_cache[blocks.to(torch.int64)].float().unbind(2)
    if packed:
        keys = keys.unflatten(-1, (-1, head_size // 2, SLOTS, 2)).transpose(3, 4)
        values = values.unflatten(-1, (head_size // ELEMENTS, -1, ELEMENTS, 2))
        values = values.permute(0, 1, 3, 5, 2, 4)
    else:
        keys = keys.unflatten(-1, (head_size, -1)).transpose(-1, -2)
    by_slot = (half.flatten(2).unflatten(2, (-1, head_size)) for half in (keys, values))
    rows, others = (half.transpose(0, 1).flatten(1, 2)[:, slots] for half in by_slot)
    return rows, others
