"""MixKV: importance and diversity, mixed by how alike a head's keys are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView
from vllm_avl.policies.rows import in_unit_range, similarity


@dataclass(frozen=True)
class MixKVPolicy(Policy):
    """Keeps vision tokens that are attended to, or unlike others (arXiv 2510.20707).

    r · D + (1 - r) · (A + V) for each KV head, added over heads. A is the attention of
    the question, V the norm of the value, D how little the key is like the head's mean
    key; V and D are scaled to A's mean. r is the mean cosine of two keys of the head:
    where keys are alike, diversity counts. Refreshes rank by attention.
    """

    window: ClassVar[int] = 32
    observes_vision: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = True

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by the mix; by attention where keys are not at hand."""
        if view.keys is None or view.values is None:
            return view.attention
        alike, num_tokens = similarity(view.keys), len(view.positions)
        mean = view.attention.mean(1, keepdim=True)
        diversity = _with_mean(in_unit_range(-alike), mean)
        norm = _with_mean(in_unit_range(view.values.norm(dim=2)), mean)
        pairs = alike.mean(1, keepdim=True) * num_tokens - 1
        redundancy = (pairs / max(num_tokens - 1, 1)).clamp(0, 1)
        importance = view.attention + norm
        return redundancy * diversity + (1 - redundancy) * importance


def _with_mean(numbers: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return numbers * mean / numbers.mean(1, keepdim=True).clamp(min=1e-8)
