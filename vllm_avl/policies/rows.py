"""What keys and values say of a token, whoever asks."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def in_unit_range(numbers: torch.Tensor) -> torch.Tensor:
    """Bring the numbers of each head, [num_heads, num_tokens], to [0, 1]."""
    least, most = numbers.aminmax(dim=1, keepdim=True)
    return (numbers - least) / (most - least).clamp(min=torch.finfo(numbers.dtype).tiny)


def similarity(keys: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of each key with all of its head, itself included.

    Args:
        keys: [num_heads, num_tokens, head_size].
    """
    unit = normalize(keys, dim=2)
    return (unit * unit.mean(1, keepdim=True)).sum(2)
