"""The compiled operators that a LLaVA calls, in torch.

For vLLM's CUDA wheel, whose extension has no bodies for a CPU and loads with a driver.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def rms_norm(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> None:
    """Normalise the last dimension into `out`."""
    x = input.float()
    x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(input.dtype)
    out.copy_(x if weight is None else x * weight)


def fused_add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
) -> None:
    """Add `input` to `residual`, and normalise the sum into `input`."""
    residual.add_(input)
    rms_norm(input, residual, weight, epsilon)


def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    """Gate the second half of the last dimension by the first."""
    gate, value = input.chunk(2, -1)
    out.copy_(silu(gate) * value)


def gelu_quick(out: torch.Tensor, input: torch.Tensor) -> None:
    """Apply the approximation of GELU that CLIP has."""
    out.copy_(input * torch.sigmoid(1.702 * input))


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotate queries and keys in place, halves of a head against each other."""
    assert is_neox
    assert not rope_dim_offset
    assert not inverse
    rows = cos_sin_cache[positions.flatten()]
    cos, sin = rows.unsqueeze(1).chunk(2, -1)
    size = cos.shape[-1]
    for tensor in (query,) if key is None else (query, key):
        heads = tensor.view(len(rows), -1, head_size)
        low, high = heads[..., : 2 * size].clone().split(size, -1)
        heads[..., :size] = low * cos - high * sin
        heads[..., size : 2 * size] = high * cos + low * sin


def scaled_fp8_quant(
    input: torch.Tensor, scale: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand for the function of vLLM's `_custom_ops`, by a scale for all."""
    assert options.pop("group_shape", None) in (None, (-1, -1))
    assert not any(options.values())
    return as_fp8(input, scale), scale


def as_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `x` in e4m3, whose numbers stand for multiples of `scale`."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)


OPERATORS = {
    "rms_norm(Tensor! out, Tensor input, Tensor? weight, float epsilon) -> ()": (
        rms_norm
    ),
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, "
    "float epsilon) -> ()": fused_add_rms_norm,
    "silu_and_mul(Tensor! out, Tensor input) -> ()": silu_and_mul,
    "gelu_quick(Tensor! out, Tensor input) -> ()": gelu_quick,
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox, int rope_dim_offset=0, bool inverse=False) "
    "-> ()": rotary_embedding,
}
"""By the schemas of vLLM's own."""


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Write rows into the cache; slots below zero are padding's.

    Args:
        key: [at least num_tokens, num_kv_heads, head_size].
        value: as key.
        key_cache: [num_blocks, block_size, num_kv_heads, head_size].
        value_cache: as key_cache.
        slot_mapping: [num_tokens].
        kv_cache_dtype: the model's, or e4m3.
        k_scale: [], what keys in e4m3 are multiples of.
        v_scale: as k_scale.
    """
    assert kv_cache_dtype in ("auto", "fp8", "fp8_e4m3")
    if kv_cache_dtype != "auto":
        key, value = as_fp8(key, k_scale), as_fp8(value, v_scale)
        key_cache, value_cache = (
            cache.view(key.dtype) for cache in (key_cache, value_cache)
        )
    block_size = key_cache.shape[1]
    is_padding = (slot_mapping < 0)[:, None, None]
    slots = slot_mapping.clamp(min=0)
    where = slots // block_size, slots % block_size
    for cache, rows in ((key_cache, key), (value_cache, value)):
        # The null block keeps its first row.
        cache[where] = torch.where(is_padding, cache[0, 0], rows[: len(slots)])
