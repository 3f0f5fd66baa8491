"""The baseline that evicts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView


@dataclass(frozen=True)
class FullPolicy(Policy):
    """Keeps everything: the request is served exactly as stock."""

    adapts: ClassVar[bool] = False

    def score(self, view: TokenView) -> torch.Tensor:
        """Score all tokens alike."""
        return torch.zeros_like(view.attention)
