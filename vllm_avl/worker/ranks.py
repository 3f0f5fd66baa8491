"""What tensor-parallel ranks agree on before they rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel group."""

    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    """Sums a tensor over the ranks."""
    all_gather: Callable[[torch.Tensor, int], torch.Tensor]
    """Concatenates a tensor of every rank along a dimension."""

    def reduce(self, scores: torch.Tensor, head_reduction: str) -> torch.Tensor:
        """Return the scores over all ranks' heads, the same on each rank.

        Args:
            scores: [1, num_candidates] over this rank's heads.
            head_reduction: mean (scores are sums) or max.
        """
        if head_reduction == "mean":
            return self.all_reduce(scores)
        return self.all_gather(scores, 0).amax(0, keepdim=True)


RANKS = Ranks(tensor_model_parallel_all_reduce, tensor_model_parallel_all_gather)
"""vLLM's group."""
