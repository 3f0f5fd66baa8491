"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class StreamingPolicy(Policy):
    """Keeps the first tokens and the most recent ones (arXiv 2309.17453)."""

    num_sinks: int = 4

    ranks_text: ClassVar[bool] = True
    refreshes: ClassVar[bool] = False

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by position; the first tokens are protected."""
        scores = view.positions.float().unsqueeze(0)
        return scores.masked_fill(view.positions < self.num_sinks, torch.inf)
