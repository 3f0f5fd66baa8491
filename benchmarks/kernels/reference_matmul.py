"""What the operators of `select_rows_matmul` give, by eager PyTorch."""

from __future__ import annotations

import torch


def select_columns_matmul(
    query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """As `select_columns_matmul`, in the precision of `query`."""
    sliced = [rows[:, chosen] for rows, chosen in zip(key, indices.long(), strict=True)]
    return query @ torch.stack(sliced).to(query.dtype).mT


def select_rows_matmul(
    weights: torch.Tensor, value: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """As `select_rows_matmul`, in the precision of `weights`."""
    pairs = zip(value, indices.long(), strict=True)
    sliced = [rows[:, chosen] for rows, chosen in pairs]
    return weights @ torch.stack(sliced).to(weights.dtype)
