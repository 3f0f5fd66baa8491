"""FastV: one ranking for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView

RANKING_LAYER = 1


@dataclass(frozen=True)
class FastVPolicy(Policy):
    """Keeps the vision tokens that the second layer attends to (arXiv 2403.06764).

    FastV evicts nothing in the layers before; at an equal budget layer 0 has to, and
    ranks by its own attention.
    """

    refreshes: ClassVar[bool] = False

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by the attention of layer 1, in it and behind it."""
        if view.layer > RANKING_LAYER:
            return view.memo["fastv"]
        view.memo["fastv"] = view.attention
        return view.attention
