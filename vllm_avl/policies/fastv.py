"""FastV: one ranking for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView

NUM_OWN = 2
"""Adapted layers that rank by their own attention; the last of them for all others."""


@dataclass(frozen=True)
class FastVPolicy(Policy):
    """Keeps the vision tokens that the second layer attends to (arXiv 2403.06764).

    FastV evicts nothing in the layers before; at an equal budget the first has to, and
    ranks by its own attention. Layers that are not adapted do not count.
    """

    refreshes: ClassVar[bool] = False
    spans_layers: ClassVar[bool] = True

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by the attention of the second adapted layer, in it and behind it."""
        ranking = view.memo.setdefault("fastv_layers", [])
        if view.layer not in ranking and len(ranking) < NUM_OWN:
            ranking.append(view.layer)
        if view.layer not in ranking:
            return view.memo["fastv"]
        view.memo["fastv"] = view.attention
        return view.attention
