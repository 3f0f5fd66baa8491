"""KeyDiff with value norms: no question decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_avl.policies.base import Policy, TokenView
from vllm_avl.policies.rows import in_unit_range, similarity


@dataclass(frozen=True)
class KeyDiffPolicy(Policy):
    """Keeps vision tokens unlike the others, whatever is asked (arXiv 2504.15364).

    D · V for each KV head, both in [0, 1], added over heads: D is how little the key is
    like the head's mean key, which is KeyDiff; V the norm of the value, as in MixKV
    (arXiv 2510.20707). Refreshes rank by attention.
    """

    reads_rows: ClassVar[bool] = True

    def score(self, view: TokenView) -> torch.Tensor:
        """Score by key and value; by attention where they are not at hand."""
        if view.keys is None or view.values is None:
            return view.attention
        diversity = in_unit_range(-similarity(view.keys))
        return diversity * in_unit_range(view.values.norm(dim=2))
