"""What interpreted kernels of recurrent layers want besides: FLA's, and convolutions.

The kernels are vLLM's own. FLA's chunks are refused in fp32, in which tokens are
compared here; all of their kernels are right in it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner, Config

ORDERED = ("gdc_wait", "gdc_launch_dependents")
"""Instructions that order a kernel and the next one; here one runs after the other."""


def install() -> None:
    """Let them be interpreted; before the layers are imported."""
    for name in ORDERED:
        setattr(tl.extra.cuda, name, lambda: None)
    torch.accelerator.device_index = lambda index: nullcontext()
    # Tuning would time them.
    Autotuner.prune_configs = first_config
    from vllm.third_party.flash_linear_attention import ops

    ops.chunk_gated_delta_rule = chunk_gated_delta_rule


def first_config(self: Autotuner, kwargs: dict[str, Any]) -> list[Config]:
    """Stand for `Autotuner.prune_configs`: one is left."""
    return self.configs[:1]


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    use_qk_l2norm_in_kernel: bool,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand for vLLM's function of this name, for any dtype."""
    from vllm.third_party.flash_linear_attention.ops.chunk import (
        chunk_gated_delta_rule_fwd,
    )

    assert not use_qk_l2norm_in_kernel
    scale = k.shape[-1] ** -0.5
    results = chunk_gated_delta_rule_fwd(q=q, k=k, v=v, scale=scale, **others)
    _, output, _, final_state, *_ = results
    return output.to(q.dtype), final_state
