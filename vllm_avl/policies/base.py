"""What a policy is: pure tensors in, a ranking out.

The template around it (`vllm_avl.worker.selection`) owns budgets, protection, top-k
and the order of equal scores, so that all policies spend the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class TokenView:
    """The tokens a policy ranks, in one layer of one request.

    `num_groups` is 1 for a policy that ranks once a layer, and the number of KV heads
    for one that ranks for each of them, or that sees `keys` and `values`.
    """

    positions: torch.Tensor
    """[num_tokens] positions in the sequence, ascending, int64."""
    attention: torch.Tensor
    """[num_groups, num_tokens] attention probability from the scoring rows, fp32: over
    all heads (mean or max, up to a factor) or summed over a KV head's query heads."""
    sums: torch.Tensor | None
    """[num_groups, num_tokens] running sums of attention; None unless `keeps_sums`."""
    held: torch.Tensor
    """[num_groups, num_tokens], False where a token is gone already."""
    num_kept: torch.Tensor
    """[num_groups, 1] how many of the held tokens will stay, int64."""
    num_scoring_rows: int
    """Last prompt tokens that score."""
    layer: int
    """Index of the layer."""
    num_computed: int
    """Length of the sequence."""
    memo: dict[str, Any]
    """Shared by the layers of one request and step."""
    keys: torch.Tensor | None = None
    """[num_groups, num_tokens, head_size] as they are cached, rotated, fp32; None
    unless `reads_rows`, and at refreshes."""
    values: torch.Tensor | None = None
    """As `keys`."""


@dataclass(frozen=True)
class Policy(ABC):
    """Ranks tokens: the higher its score, the longer a token stays.

    The class attributes say what the template has to hand in.
    """

    window: ClassVar[int] = 1
    """Last prompt tokens that score, unless a setting says otherwise."""
    observes_vision: ClassVar[bool] = True
    """Whether the last picture's own tokens may be among those that score."""
    ranks_text: ClassVar[bool] = False
    """Whether text competes with vision (the policy does not know modalities)."""
    per_head: ClassVar[bool] = False
    """Whether every KV head has a ranking of its own."""
    keeps_sums: ClassVar[bool] = False
    """Whether attention is added up over the request's life."""
    reads_rows: ClassVar[bool] = False
    """Whether it looks at keys and values, at the prompt's end. It then scores for each
    KV head; unless `per_head`, the template reduces these scores over all heads."""
    ranks_attention: ClassVar[bool] = False
    """Whether the attention over all heads is the score, so that kernels may rank."""
    spans_layers: ClassVar[bool] = False
    """Whether a layer's ranking needs another layer's, through the view's `memo`."""
    refreshes: ClassVar[bool] = True
    """Whether core is selected anew during the answer."""
    adapts: ClassVar[bool] = True
    """Whether anything is evicted at all."""

    @abstractmethod
    def score(self, view: TokenView) -> torch.Tensor:
        """Return [num_groups, num_tokens] scores; infinite protects a token."""
