"""FlashAttention 3 in plain torch, under the names and parameters of vLLM's functions.

It can do what decoder layers ask for; any other argument raises. What the real kernels
take for granted poisons the output with NaN here if it is not so: that no sequence is
longer than said, and that the schedule was made for these lengths.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from standin import torch_ops

UNUSED = (
    *("batch_size", "num_heads_q", "num_heads_kv", "headdim", "qkv_dtype", "page_size"),
    *("max_seqlen_q", "num_splits", "fa_version"),
)
"""Arguments of the real functions that do not change results here."""

_LIBRARY = torch.library.Library("_C_cache_ops", "FRAGMENT")


def install() -> None:
    """Put it where vLLM looks for the kernels; before its back end is imported."""
    package = sys.modules["vllm.vllm_flash_attn"]
    interface = sys.modules[f"{package.__name__}.flash_attn_interface"]
    interface.FA3_AVAILABLE = True
    for ours in (flash_attn_varlen_func, get_scheduler_metadata):
        theirs = getattr(interface, ours.__name__)
        for module in (package, interface):
            setattr(module, ours.__name__, stand_for(theirs, ours))
    name = _LIBRARY.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor k_scale, Tensor v_scale) -> ()"
    )
    _LIBRARY.impl(name, reshape_and_cache, "CompositeExplicitAutograd")
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    # The real kernels have no fp32, and tokens are compared in it.
    FlashAttentionBackend.supported_dtypes.append(torch.float32)


def stand_for(theirs: Callable[..., Any], ours: Callable[..., Any]):
    """Return `ours` with the parameters of `theirs`.

    What `ours` does not take must have its default.
    """
    signature, taken = inspect.signature(theirs), inspect.signature(ours).parameters
    assert set(taken) <= set(signature.parameters)

    @wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            default = signature.parameters[name].default
            if name not in (*taken, *UNUSED) and value != default:
                raise NotImplementedError(f"{theirs.__name__}: {name} = {value!r}")
        return ours(**{name: bound.arguments[name] for name in taken})

    return call


def get_scheduler_metadata(
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Return a schedule as large as the real one, which holds the lengths."""
    assert causal
    assert window_size == (-1, -1)
    num_reqs = len(cache_seqlens)
    assert cu_seqlens_q.shape == (num_reqs + 1,)
    schedule = torch.zeros(1 + -(-num_reqs // 4) * 4 * 4, dtype=torch.int32)
    fits = cache_seqlens <= max_seqlen_k
    schedule[1 : num_reqs + 1] = torch.where(fits, cache_seqlens, -1)
    return schedule


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    softcap: float,
    block_table: torch.Tensor,
    return_softmax_lse: bool,
    out: torch.Tensor,
    scheduler_metadata: torch.Tensor | None,
    q_descale: torch.Tensor | None,
    k_descale: torch.Tensor | None,
    v_descale: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend; see the real function.

    No value is read, so that it can be captured.

    Args:
        q: [num_tokens, num_heads, head_size].
        k: [num_blocks, block_size, num_kv_heads, head_size], of q's dtype.
        v: as k.
        cu_seqlens_q: [num_reqs + 1].
        max_seqlen_k: of `seqused_k`.
        seqused_k: [num_reqs].
        softmax_scale: of the logits.
        causal: must be true.
        window_size: must be none.
        softcap: tanh cap on the logits, 0 for none.
        block_table: [num_reqs, max_blocks].
        return_softmax_lse: return [num_heads, num_tokens] beside the output.
        out: as q.
        scheduler_metadata: of `get_scheduler_metadata`.
        q_descale: [num_reqs, num_kv_heads], what fp8 is multiplied by.
        k_descale: as q_descale.
        v_descale: as q_descale.
    """
    assert causal
    assert q.dtype == k.dtype == v.dtype
    assert tuple(window_size) == (-1, -1)
    tokens = torch.arange(len(q))
    # [num_tokens] keys that a token sees, counted from its sequence's end.
    rows = torch.searchsorted(cu_seqlens_q[1:], tokens, right=True)
    lse = q.new_full((q.shape[1], len(q)), -torch.inf, dtype=torch.float32)
    out.zero_()
    group = q.shape[1] // k.shape[2]
    for row, blocks in enumerate(block_table):
        q_row, k_row, v_row = q, k[blocks], v[blocks]
        if q.dtype.itemsize == 1:
            q_row = q.float() * q_descale[row].repeat_interleave(group)[:, None]
            k_row = k_row.float() * k_descale[row][:, None]
            v_row = v_row.float() * v_descale[row][:, None]
        fits = seqused_k[row] <= max_seqlen_k
        if scheduler_metadata is not None:
            fits &= scheduler_metadata[1 + row] == seqused_k[row]
        ends = seqused_k[row] - (cu_seqlens_q[row + 1] - tokens) + 1
        attended, norm = attend(q_row, k_row, v_row, ends, softmax_scale, softcap)
        mine = rows == row
        attended = torch.where(fits, attended, torch.nan)
        out.copy_(torch.where(mine[:, None, None], attended, out))
        lse.copy_(torch.where(mine, norm.T, lse))
    return (out, lse) if return_softmax_lse else out


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend every token to the keys in front of its end, in fp32.

    Args:
        q: [num_tokens, num_heads, head_size].
        k: [num_blocks, block_size, num_kv_heads, head_size] of one sequence.
        v: as k.
        ends: [num_tokens].
        scale: of the logits.
        softcap: tanh cap on the logits, 0 for none.

    Returns:
        as q, and the norms' logarithms: [num_tokens, num_heads].
    """
    group = q.shape[1] // k.shape[2]
    keys, values = (
        rows.flatten(0, 1).float().repeat_interleave(group, dim=1) for rows in (k, v)
    )
    logits = torch.einsum("thd,khd->thk", q.float(), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    seen = torch.arange(len(keys)) < ends[:, None]
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    attended = torch.einsum("thk,khd->thd", logits.softmax(-1), values)
    return attended.to(q.dtype), logits.logsumexp(-1)


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
        key, value = torch_ops.as_fp8(key, k_scale), torch_ops.as_fp8(value, v_scale)
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
