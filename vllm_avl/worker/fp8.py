"""Caches of fp8, which vLLM hands out as bytes."""

from __future__ import annotations

import torch


def number_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what rows are made of in a cache that vLLM says is of `dtype`.

    Bytes are e4m3: what else they might be is refused at start-up.
    """
    return torch.float8_e4m3fn if dtype == torch.uint8 else dtype


def as_numbers(cache: torch.Tensor) -> torch.Tensor:
    """Return a view of a layer's cache whose elements are numbers, not codes."""
    return cache.view(number_dtype(cache.dtype))
