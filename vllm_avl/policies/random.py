"""Random vision tokens: what any ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Keeps vision tokens at random, anew in each layer and at each refresh.

    The draw is a function of layer and lengths: a request gets the same tokens whoever
    is served beside it, on every rank.
    """

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by a draw."""
        generator = torch.Generator().manual_seed(view.num_computed * 1009 + view.layer)
        draw = torch.rand(1, len(view.positions), generator=generator)
        return draw.to(view.positions.device)
