"""Decode attention of others over the same paged cache, called as vLLM calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.paged import Heads, Pool, Reads

TRITON, FLASH, XFORMERS = "TRITON_ATTN", "FLASH_ATTN", "xformers"
SLICE = "index_select + SDPA"

Attend = Callable[["Tail"], torch.Tensor]


class Tail(NamedTuple):
    """The slots that one copy of the batch reads, as any paged kernel takes them."""

    block_table: torch.Tensor
    """[batch, blocks], of what is stored."""
    seq_lens: torch.Tensor
    """[batch] int32, as block_table."""
    max_seq_len: int


def tails(pool: Pool, reads: Reads) -> list[Tail]:
    """Return one tail a copy of the batch.

    Raises:
        ValueError: not all of the pool's slots are read.
    """
    if reads.first_slot or reads.num_core:
        raise ValueError(f"{reads.name} does not read all that is stored")
    return [
        Tail(table, table.new_full((len(table),), reads.num_rows), reads.num_rows)
        for table in pool.tables
    ]


def triton_attention(heads: Heads, pool: Pool, query: torch.Tensor) -> Attend:
    """Return vLLM's TRITON_ATTN, in the split form it decodes small batches with.

    Raises:
        ImportError: vLLM has disabled Triton.
    """
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise ImportError("vLLM has disabled Triton in this installation")
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    ones = query.new_ones(len(query), heads.num_kv_heads, dtype=torch.float32)
    output = torch.empty_like(query)
    arguments = {
        **_common(heads, pool, query, output),
        **_scratch(heads, query, triton_attn),
        "window_size": (-1, -1),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": ones,
        "v_descale": ones,
    }

    def attend(tail: Tail) -> torch.Tensor:
        unified_attention(
            **arguments,
            seqused_k=tail.seq_lens,
            max_seqlen_k=tail.max_seq_len,
            block_table=tail.block_table,
        )
        return output

    return attend


def flash_attention(heads: Heads, pool: Pool, query: torch.Tensor) -> Attend:
    """Return vLLM's FlashAttention.

    Raises:
        ImportError: it is not installed.
    """
    flash = flash_function()
    output = torch.empty_like(query)
    arguments = _common(heads, pool, query, output)

    def attend(tail: Tail) -> torch.Tensor:
        flash(
            **arguments,
            seqused_k=tail.seq_lens,
            max_seqlen_k=tail.max_seq_len,
            block_table=tail.block_table,
        )
        return output

    return attend


def flash_function() -> Callable[..., torch.Tensor]:
    """Return the FlashAttention that vLLM ships: version 3 where it runs, else 2.

    Raises:
        ImportError: it is not installed.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported

    fa_version = 3 if is_fa_version_supported(3) else 2
    return partial(flash_attn_varlen_func, fa_version=fa_version)


def xformers_attention(
    heads: Heads, pool: Pool, query: torch.Tensor
) -> Callable[[Any], torch.Tensor]:
    """Return xformers' split-K attention, called with a mask of `xformers_masks`.

    Its tile of keys divides a page: with blocks of 16 slots it is 16, not its own 64.

    Raises:
        ImportError: it is not installed.
    """
    from xformers.ops import fmha

    splitk = fmha.triton_splitk.FwOp
    block_n = min(splitk.BLOCK_N, pool.block_size)
    operator = type("PagedFwOp", (splitk,), {"BLOCK_N": block_n})
    group = heads.num_heads // heads.num_kv_heads
    # [1, rows, KV heads, group, head_size], every row in each member of the group.
    keys, values = (
        half[None, :, :, None].expand(-1, -1, -1, group, -1)
        for half in pool.rows.split(heads.head_size, -1)
    )
    queries = query.view(1, len(query), heads.num_kv_heads, group, heads.head_size)

    def attend(mask: Any) -> torch.Tensor:
        output = fmha.memory_efficient_attention_forward(
            queries, keys, values, mask, scale=heads.scale, op=operator
        )
        return output.view_as(query)

    return attend


def xformers_masks(pool: Pool, reads: Reads) -> list[Any]:
    """Return one PagedBlockDiagonalGappyKeysMask a copy of the batch.

    Raises:
        ImportError: xformers is not installed.
    """
    from xformers.ops.fmha import attn_bias

    _, batch, num_blocks = pool.tables.shape
    padding = num_blocks * pool.block_size
    # A paged mask cannot be made directly: xformers 0.0.35 refuses any lengths.
    gappy = attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        [1] * batch,
        [i * padding for i in range(batch + 1)],
        [reads.num_rows] * batch,
        device=pool.tables.device,
    )
    paged = attn_bias.PagedBlockDiagonalGappyKeysMask
    return [
        gappy.make_paged(table, pool.block_size, padding, paged)
        for table in pool.tables
    ]


def sliced_attention(
    heads: Heads, pool: Pool, query: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return slice-then-attend: index_select of keys and values at once, then torch."""

    def attend(rows: torch.Tensor) -> torch.Tensor:
        chosen = pool.rows.index_select(0, rows.flatten())
        chosen = chosen.view(*rows.shape, *chosen.shape[1:]).transpose(1, 2)
        keys, values = chosen.split(heads.head_size, -1)
        return scaled_dot_product_attention(
            query.unsqueeze(2),
            keys,
            values,
            scale=heads.scale,
            enable_gqa=heads.num_heads != heads.num_kv_heads,
        ).squeeze(2)

    return attend


def _common(
    heads: Heads, pool: Pool, query: torch.Tensor, output: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments that TRITON_ATTN and FlashAttention share."""
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    return {
        "q": query,
        "k": pool.keys.transpose(1, 2),
        "v": pool.values.transpose(1, 2),
        "out": output,
        "cu_seqlens_q": starts,
        "max_seqlen_q": 1,
        "softmax_scale": heads.scale,
        "causal": True,
    }


def _scratch(heads: Heads, query: torch.Tensor, backend: ModuleType) -> dict[str, Any]:
    """Return what TRITON_ATTN's metadata builder allocates, of the same sizes."""
    threshold = backend.MIN_LAUNCH_GRID_SIZE_2D // heads.num_kv_heads
    segments = backend.NUM_PAR_SOFTMAX_SEGMENTS
    shape = threshold, heads.num_heads, segments
    width = 1 << (heads.head_size - 1).bit_length()
    wide = partial(query.new_empty, dtype=torch.float32)
    return {
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": segments,
        "softmax_segm_output": wide(*shape, width),
        "softmax_segm_max": wide(shape),
        "softmax_segm_expsum": wide(shape),
    }
