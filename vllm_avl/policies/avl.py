"""A-VL: vision tokens by the attention they get."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class AVLPolicy(Policy):
    """Keeps the vision tokens that the last prompt token attends to most.

    A-VL (arXiv 2409.14846), section "Vision attention".
    """

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by attention."""
        return view.attention
