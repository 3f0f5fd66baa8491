"""The oracle of each operation: obvious code, in the precision of `query`."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from vllm_avl.kernels.cpu.attention import DecodeRows
from vllm_avl.kernels.cpu.read_rows import read_rows


def attention_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    output: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    *,
    packed: bool = False,
) -> torch.Tensor:
    """As `cpu.attention_scores`."""
    num_rows, num_heads, _ = query.shape
    group = num_heads // kv_cache.shape[1]
    scales = k_scale, v_scale
    keys, values = _rows(query, kv_cache, blocks, num_tokens, scales, packed)
    scores = torch.zeros(num_heads, num_tokens, dtype=query.dtype)
    for row in range(num_rows):
        visible = num_tokens - num_rows + 1 + row
        for head in range(num_heads):
            seen = keys[:visible, head // group]
            attention = _attend(query[row, head], seen, scale, soft_cap)
            scores[head, :visible] += attention
            if output is not None:
                output[row, head] = attention @ values[:visible, head // group]
    return scores


def selected_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: DecodeRows,
    masks: np.ndarray,
    output: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    *,
    packed: bool = False,
) -> dict[int, torch.Tensor]:
    """As `cpu.selected_attention`."""
    num_heads, scales = query.shape[1], (k_scale, v_scale)
    group = num_heads // kv_cache.shape[1]
    kept = {}
    for row, (token, num_tokens) in enumerate(
        zip(rows.tokens, rows.num_tokens, strict=True)
    ):
        blocks = rows.block_table[row]
        keys, values = _rows(query, kv_cache, blocks, num_tokens, scales, packed)
        probabilities = torch.zeros(num_heads, num_tokens, dtype=query.dtype)
        for head in range(num_heads):
            read = _read(rows, masks, row, head // group)
            seen = keys[read, head // group]
            attention = _attend(query[token, head], seen, scale, soft_cap)
            output[token, head] = attention @ values[read, head // group]
            probabilities[head, read] = attention
        if rows.scored[row]:
            kept[row] = probabilities
    return kept


def rank_rows(
    scores: torch.Tensor,
    core_scores: torch.Tensor,
    num_stored: int,
    num_core: int,
    candidates: torch.Tensor,
    fixed: torch.Tensor,
) -> torch.Tensor:
    """As `cpu.rank_rows`."""

    def value(score: float) -> float:
        return -math.inf if math.isnan(score) else score

    order = []
    for stay, of_core in zip(scores.tolist(), core_scores.tolist(), strict=True):
        best = sorted(range(len(stay)), key=lambda c: (-value(stay[c]), c))
        stored = sorted(best[:num_stored])
        if num_core < num_stored:
            stored.sort(key=lambda c: -value(of_core[c]))
        order.append([*fixed.tolist(), *(int(candidates[c]) for c in stored)])
    size = len(scores), len(fixed) + num_stored
    return torch.tensor(order, dtype=torch.int32).view(size)


def copy_rows(
    kv_cache: torch.Tensor,
    head_size: int,
    source_blocks: torch.Tensor,
    source: torch.Tensor,
    target_blocks: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    in_place: bool = True,
) -> None:
    """As `cpu.copy_rows`."""
    if target is None:
        target = torch.arange(source.shape[1]).expand_as(source)
    for half, before in zip(
        split(kv_cache, head_size), split(kv_cache.clone(), head_size), strict=True
    ):
        block_size = half.shape[2]
        for head in range(half.shape[1]):
            ranking = head if len(source) > 1 else 0
            for old, new in zip(source[ranking], target[ranking], strict=True):
                row = before[source_blocks[old // block_size], head, old % block_size]
                half[target_blocks[new // block_size], head, new % block_size] = row


def split(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [num_blocks, num_kv_heads, block_size, head_size] views."""
    keys, values = kv_cache.unbind(2)
    by_column = keys.unflatten(-1, (head_size, -1))
    return by_column.transpose(-1, -2), values.unflatten(-1, (-1, head_size))


def _read(rows: DecodeRows, masks: np.ndarray, row: int, head: int) -> torch.Tensor:
    """[num_tokens] bool, which keys a row reads of a KV head."""
    read = torch.ones(int(rows.num_tokens[row]), dtype=torch.bool)
    if masks[row]:
        address = int(masks[row] + head * rows.mask_stride[row])
        mask = (ctypes.c_bool * int(rows.num_masked[row])).from_address(address)
        read[: len(mask)] = torch.tensor(list(mask), dtype=torch.bool)
    return read


def _attend(
    query: torch.Tensor, keys: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    """[num_keys] attention probabilities of one row and head."""
    logits = keys @ query * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return torch.exp(logits - torch.logsumexp(logits, 0))


def _rows(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scales: tuple[float, float],
    packed: bool,
) -> list[torch.Tensor]:
    """[num_tokens, num_kv_heads, head_size] keys and values, as `query` is."""
    head_size = query.shape[2]
    num_blocks = -(-int(num_tokens) * head_size // kv_cache.shape[3])
    slots = torch.arange(int(num_tokens))
    halves = read_rows(kv_cache, head_size, blocks[:num_blocks], slots, packed=packed)
    return [
        half.transpose(0, 1).to(query.dtype) * scale
        for half, scale in zip(halves, scales, strict=True)
    ]
