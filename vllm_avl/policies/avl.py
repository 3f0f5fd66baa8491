"""A-VL: vision tokens by the attention they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class AVLPolicy(Policy):
    """Keeps the vision tokens that the text behind the last picture attends to most.

    A-VL (arXiv 2409.14846), section "Vision attention", where the last token decides.
    """

    window: ClassVar[int] = 32
    observes_vision: ClassVar[bool] = False
    ranks_attention: ClassVar[bool] = True

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by attention."""
        return view.attention
