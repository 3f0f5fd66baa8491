"""The oracle of every GPU kernel of ours, as obvious as the one of the CPU's."""

from __future__ import annotations

import torch
from vllm_avl.kernels import reference


def vision_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.gpu.vision_scores`, in the precision of `query`."""
    keys = key_cache.to(query.dtype)
    if k_scale is not None:
        keys = keys * k_scale.to(query.dtype)
    return reference.attention_scores(
        query, keys, blocks.long(), num_tokens, scale, soft_cap
    )


def exchange_rows(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """As `kernels.gpu.exchange_rows`."""
    real = source >= 0
    moved = None if heads is None else heads[real]
    reference.exchange_rows(
        key_cache, value_cache, blocks.long(), source[real], target[real], moved
    )


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """As `kernels.gpu.compact_blocks`."""
    real = (source >= 0) & (target >= 0)
    moved = None if heads is None else heads[real]
    reference.compact_blocks(
        key_cache, value_cache, blocks.long(), source[real], target[real], moved
    )


def select_columns_matmul(
    query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gpu.select_columns_matmul`, in the precision of `query`."""
    sliced = [rows[:, chosen] for rows, chosen in zip(key, indices.long(), strict=True)]
    return query @ torch.stack(sliced).to(query.dtype).mT


def select_rows_matmul(
    weights: torch.Tensor, value: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gpu.select_rows_matmul`, in the precision of `weights`."""
    pairs = zip(value, indices.long(), strict=True)
    sliced = [rows[:, chosen] for rows, chosen in pairs]
    return weights @ torch.stack(sliced).to(weights.dtype)
