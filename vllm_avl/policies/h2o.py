"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class H2OPolicy(Policy):
    """Keeps the most recent tokens and the heavy hitters (arXiv 2306.14048).

    Any token, for each KV head: 75 % of the budget is recent, the rest goes to the
    largest running sums of attention, which begin with the scoring rows.
    """

    recent_ratio: float = 0.75

    window: ClassVar[int] = 32
    ranks_text: ClassVar[bool] = True
    per_head: ClassVar[bool] = True
    keeps_sums: ClassVar[bool] = True

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by running sum; recent tokens are protected."""
        assert view.sums is not None
        num_recent = (self.recent_ratio * view.num_kept).round()
        num_behind = view.held.flip(1).cumsum(1).flip(1)
        return view.sums.masked_fill(num_behind <= num_recent, torch.inf)
