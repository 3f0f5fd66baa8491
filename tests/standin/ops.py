"""The compiled operators: those of vLLM's CPU build, under the CUDA build's names.

In vLLM's CUDA wheel, which has no bodies for a CPU, those of `torch_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from standin import torch_ops

QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)

_LIBRARY = torch.library.Library("_C", "FRAGMENT")


def install() -> None:
    """Load the CPU extension and define what only the CUDA one has."""
    from vllm.platforms.cpu import CpuPlatform

    # rms_norm, rotary_embedding, silu_and_mul, ... have the same names and schemas.
    CpuPlatform.import_kernels()
    if not hasattr(torch.ops._C, "rms_norm"):
        for schema, body in torch_ops.OPERATORS.items():
            define(schema, body)
    # CUDA graphs keep their outputs by this; here an alias will do.
    define("weak_ref_tensor(Tensor(a) tensor) -> Tensor(a)", lambda t: t.view_as(t))
    from vllm import _custom_ops

    # The CPU build has its name alone.
    _custom_ops.scaled_fp8_quant = torch_ops.scaled_fp8_quant
    # vLLM asks for quantised kernels at import: there are none.
    for name in QUESTIONS:
        define(f"{name}(int capability) -> bool", lambda capability: False)


def use_torch_in_layers() -> None:
    """Let layers that know no request run vLLM's own torch.

    Kernels of the first one come with FlashAttention's. Interpreting those of the
    others, a program for a token or two, takes most of a Qwen's time.
    """
    from vllm.model_executor.layers.layernorm import RMSNormGated
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
    from vllm.model_executor.models import qwen3_vl

    # Of the tower's positions.
    qwen3_vl.HAS_TRITON = False
    for layer in (ApplyRotaryEmb, MRotaryEmbedding, RMSNormGated):
        layer.forward_cuda = layer.forward_native


def define(schema: str, body: Callable[..., Any]) -> None:
    """Define the operator `_C::schema`."""
    name = _LIBRARY.define(schema)
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
