"""Multiplies one row with selected columns of Kᵀ, or with selected rows of V.

A-VL's bare operator on plain tensors: what is selected is gathered inside the kernel,
nothing is sliced out first. Engines attend to paged rows and do without it.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS_AT_A_TIME = 64
BYTES_OF_A_ROW = 64


@triton.jit
def _select_columns_kernel(
    scores_ptr,  # [batch, num_heads, 1, num_selected]
    query_ptr,  # [batch, num_heads, 1, head_size]
    key_ptr,  # [batch, num_heads, num_tokens, head_size]
    indices_ptr,  # [batch, num_selected]
    num_selected,
    scores_stride_batch,
    scores_stride_head,
    query_stride_batch,
    query_stride_head,
    key_stride_batch,
    key_stride_head,
    key_stride_token,
    indices_stride_batch,
    head_size: tl.constexpr,
    rows: tl.constexpr,
    block_d: tl.constexpr,
):
    # A program owns rows selected keys of one head.
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    selected = tl.program_id(0) * rows + tl.arange(0, rows)
    exists = selected < num_selected
    column = tl.arange(0, block_d)
    inside = column < head_size
    query_ptr += batch * query_stride_batch + head * query_stride_head
    query = tl.load(query_ptr + column, mask=inside, other=0.0).to(tl.float32)
    indices_ptr += batch * indices_stride_batch
    token = tl.load(indices_ptr + selected, mask=exists, other=0).to(tl.int64)
    key_ptr += batch * key_stride_batch + head * key_stride_head
    keys = tl.load(
        key_ptr + (token * key_stride_token)[:, None] + column[None, :],
        mask=exists[:, None] & inside[None, :],
        other=0.0,
    )
    scores = tl.sum(keys.to(tl.float32) * query[None, :], 1)
    scores_ptr += batch * scores_stride_batch + head * scores_stride_head
    tl.store(scores_ptr + selected, scores, mask=exists)


@triton.jit
def _select_rows_kernel(
    output_ptr,  # [batch, num_heads, 1, head_size]
    weights_ptr,  # [batch, num_heads, 1, num_selected]
    value_ptr,  # [batch, num_heads, num_tokens, head_size]
    indices_ptr,  # [batch, num_selected]
    num_selected,
    output_stride_batch,
    output_stride_head,
    weights_stride_batch,
    weights_stride_head,
    value_stride_batch,
    value_stride_head,
    value_stride_token,
    indices_stride_batch,
    head_size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    # A program owns columns columns of one head's output: no sums over programs.
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = column < head_size
    indices_ptr += batch * indices_stride_batch
    weights_ptr += batch * weights_stride_batch + head * weights_stride_head
    value_ptr += batch * value_stride_batch + head * value_stride_head
    sums = tl.zeros([rows, columns], tl.float32)
    for start in range(0, num_selected, rows):
        selected = start + tl.arange(0, rows)
        exists = selected < num_selected
        token = tl.load(indices_ptr + selected, mask=exists, other=0).to(tl.int64)
        weights = tl.load(weights_ptr + selected, mask=exists, other=0.0)
        values = tl.load(
            value_ptr + (token * value_stride_token)[:, None] + column[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        sums += weights.to(tl.float32)[:, None] * values.to(tl.float32)
    output_ptr += batch * output_stride_batch + head * output_stride_head
    tl.store(output_ptr + column, tl.sum(sums, 0), mask=inside)


def select_columns_matmul(
    query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Multiply `query` with the columns `indices` of keyᵀ.

    Args:
        query: [batch, num_heads, 1, head_size].
        key: [batch, num_heads, num_tokens, head_size], any strides but the last.
        indices: [batch, num_selected] tokens, int32 or int64.

    Returns:
        [batch, num_heads, 1, num_selected] in `query`'s dtype.
    """
    batch, num_heads, _, head_size = query.shape
    num_selected = indices.shape[1]
    scores = query.new_empty(batch, num_heads, 1, num_selected)
    grid = (triton.cdiv(num_selected, ROWS_AT_A_TIME), num_heads, batch)
    _select_columns_kernel[grid](
        scores,
        query,
        key,
        indices,
        num_selected,
        *scores.stride()[:2],
        *query.stride()[:2],
        *key.stride()[:3],
        indices.stride(0),
        head_size=head_size,
        rows=ROWS_AT_A_TIME,
        block_d=triton.next_power_of_2(head_size),
    )
    return scores


def select_rows_matmul(
    weights: torch.Tensor, value: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Multiply `weights` with the rows `indices` of `value`.

    Args:
        weights: [batch, num_heads, 1, num_selected].
        value: [batch, num_heads, num_tokens, head_size], any strides but the last.
        indices: [batch, num_selected] tokens, int32 or int64.

    Returns:
        [batch, num_heads, 1, head_size] in `weights`' dtype.
    """
    batch, num_heads, _, num_selected = weights.shape
    head_size = value.shape[3]
    output = weights.new_empty(batch, num_heads, 1, head_size)
    columns = BYTES_OF_A_ROW // value.itemsize
    grid = (triton.cdiv(head_size, columns), num_heads, batch)
    _select_rows_kernel[grid](
        output,
        weights,
        value,
        indices,
        num_selected,
        *output.stride()[:2],
        *weights.stride()[:2],
        *value.stride()[:3],
        indices.stride(0),
        head_size=head_size,
        rows=ROWS_AT_A_TIME,
        columns=columns,
    )
    return output
