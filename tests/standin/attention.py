"""vLLM's Triton attention over paged blocks in plain torch, and its writing of them.

Interpreted, the two take most of the time. No value is read, so that they can be
captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from standin import torch_ops

UNUSED = (
    *("max_seqlen_q", "max_seqlen_k", "seq_threshold_3D", "num_par_softmax_segments"),
    *("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"),
    *("k_descale", "v_descale"),
)
"""Arguments of the Triton kernel that do not change results here."""


def install() -> None:
    """Put it where vLLM's back end takes the kernel from."""
    from vllm.v1.attention.backends import triton_attn

    theirs = triton_attn.unified_attention
    triton_attn.unified_attention = stand_for(theirs, unified_attention, UNUSED)
    triton_attn.triton_reshape_and_cache_flash = torch_ops.reshape_and_cache


def stand_for(
    theirs: Callable[..., Any], ours: Callable[..., Any], unused: Sequence[str]
) -> Callable[..., Any]:
    """Return `ours` with the parameters of `theirs`.

    What `ours` does not take must have its default, but for what is `unused`.
    """
    signature, taken = inspect.signature(theirs), inspect.signature(ours).parameters
    assert set(taken) <= set(signature.parameters)

    @wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            default = signature.parameters[name].default
            if name not in (*taken, *unused) and value != default:
                raise NotImplementedError(f"{theirs.__name__}: {name} = {value!r}")
        return ours(**{name: bound.arguments[name] for name in taken})

    return call


def unified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float,
    q_descale: torch.Tensor | None,
) -> None:
    """Attend; see the real function, and `paged_attention` for shapes."""
    assert causal
    assert q.dtype == k.dtype == v.dtype
    assert q_descale is None
    assert window_size[1] <= 0
    attended, _ = paged_attention(
        (q, k, v),
        cu_seqlens_q,
        seqused_k,
        block_table,
        softmax_scale,
        softcap,
        window_size[0],
    )
    out.copy_(attended)


def paged_attention(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    softcap: float,
    window: int = -1,
    scales: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the tokens of all sequences to the keys in front of them, in fp32.

    Args:
        qkv: [num_tokens, num_heads, head_size], and twice
            [num_blocks, block_size, num_kv_heads, head_size].
        cu_seqlens_q: [num_reqs + 1].
        seqused_k: [num_reqs].
        block_table: [num_reqs, max_blocks].
        scale: of the logits.
        softcap: tanh cap on the logits, 0 for none.
        window: keys that a token sees besides its own, -1 for all.
        scales: three of [num_reqs, num_kv_heads], what fp8 is multiplied by.

    Returns:
        as q, zeros behind the last sequence, and the norms' logarithms:
        [num_heads, num_tokens].
    """
    q, k, v = qkv
    tokens = torch.arange(len(q))
    rows = torch.searchsorted(cu_seqlens_q[1:], tokens, right=True)
    lse = q.new_full((q.shape[1], len(q)), -torch.inf, dtype=torch.float32)
    out = torch.zeros_like(q, dtype=torch.float32)
    for row, blocks in enumerate(block_table):
        of_row = [q.float(), k[blocks].float(), v[blocks].float()]
        if scales is not None:
            for index, one in enumerate(scales):
                group = of_row[index].shape[-2] // one.shape[1]
                factor = one[row].repeat_interleave(group)[:, None]
                of_row[index] = of_row[index] * factor
        ends = seqused_k[row] - (cu_seqlens_q[row + 1] - tokens) + 1
        attended, norm = attend(*of_row, ends, scale, softcap, window)
        mine = rows == row
        out.copy_(torch.where(mine[:, None, None], attended, out))
        lse.copy_(torch.where(mine, norm.T, lse))
    return out, lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend every token to the keys of one sequence in front of its end.

    Args:
        q: [num_tokens, num_heads, head_size].
        k: [num_blocks, block_size, num_kv_heads, head_size].
        v: as k.
        ends: [num_tokens].
        scale: of the logits.
        softcap: as in `paged_attention`.
        window: as there.

    Returns:
        as q, and the norms' logarithms: [num_tokens, num_heads].
    """
    group = q.shape[1] // k.shape[2]
    keys, values = (
        rows.flatten(0, 1).repeat_interleave(group, dim=1) for rows in (k, v)
    )
    logits = torch.einsum("thd,khd->thk", q, keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    behind = ends[:, None] - torch.arange(len(keys))
    seen = behind > 0
    if window >= 0:
        seen &= behind <= window + 1
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("thk,khd->thd", logits.softmax(-1), values), logits.logsumexp(
        -1
    )
