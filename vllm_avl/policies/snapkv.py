"""SnapKV: what the end of the prompt looks at, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class SnapKVPolicy(Policy):
    """Keeps what the last prompt tokens attend to, pooled (arXiv 2404.14469).

    Any token, for each KV head; the observing tokens themselves stay.
    """

    pool: int = 7

    window: ClassVar[int] = 32
    ranks_text: ClassVar[bool] = True
    per_head: ClassVar[bool] = True
    refreshes: ClassVar[bool] = False

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by the maximum of the attention over `pool` neighbours."""
        observing = view.positions >= view.num_computed - view.num_scoring_rows
        attention = view.attention.masked_fill(observing, 0.0)
        scores = functional.max_pool1d(
            attention, self.pool, stride=1, padding=self.pool // 2
        )
        return scores.masked_fill(observing, torch.inf)
