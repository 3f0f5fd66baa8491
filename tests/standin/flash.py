"""FlashAttention 3 in plain torch, under the names and parameters of vLLM's functions.

It can do what decoder layers ask for; any other argument raises. What the real kernels
take for granted poisons the output with NaN here if it is not so: that no sequence is
longer than said, and that the schedule was made for these lengths.
"""

from __future__ import annotations

import sys

import torch

from standin import torch_ops
from standin.attention import paged_attention, stand_for

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
            setattr(module, ours.__name__, stand_for(theirs, ours, UNUSED))
    name = _LIBRARY.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor k_scale, Tensor v_scale) -> ()"
    )
    _LIBRARY.impl(name, torch_ops.reshape_and_cache, "CompositeExplicitAutograd")
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    # The real kernels have no fp32, and tokens are compared in it.
    FlashAttentionBackend.supported_dtypes.append(torch.float32)


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
    scales = None if q.dtype.itemsize > 1 else (q_descale, k_descale, v_descale)
    attended, lse = paged_attention(
        (q, k, v),
        cu_seqlens_q,
        seqused_k,
        block_table,
        softmax_scale,
        softcap,
        scales=scales,
    )
    fits = seqused_k <= max_seqlen_k
    if scheduler_metadata is not None:
        fits &= scheduler_metadata[1 : len(fits) + 1] == seqused_k
    # Tokens behind the last sequence are padding's.
    fits = torch.cat((fits, fits.new_ones(1)))
    rows = torch.searchsorted(cu_seqlens_q[1:], torch.arange(len(q)), right=True)
    out.copy_(torch.where(fits[rows][:, None, None], attended, torch.nan))
    return (out, lse) if return_softmax_lse else out
