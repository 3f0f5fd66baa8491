"""The oracle of every GPU kernel of ours, as obvious as the one of the CPU's."""

from __future__ import annotations

import torch
from vllm_avl.kernels import reference


def vision_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.gpu.vision_scores`, in the precision of `query`."""
    keys = key_cache.to(query.dtype)
    if k_scale is not None:
        keys = keys * k_scale.to(query.dtype)
    return reference.attention_scores(
        query, keys, blocks.long(), num_tokens, scale, soft_cap
    )


def exchange_rows(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """As `kernels.gpu.exchange_rows`."""
    real = source >= 0
    moved = None if heads is None else heads[real]
    reference.exchange_rows(
        key_cache, value_cache, blocks.long(), source[real], target[real], moved
    )


def compact_blocks(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor | None = None,
) -> None:
    """As `kernels.gpu.compact_blocks`."""
    real = (source >= 0) & (target >= 0)
    moved = None if heads is None else heads[real]
    reference.compact_blocks(
        key_cache, value_cache, blocks.long(), source[real], target[real], moved
    )


def select_columns_matmul(
    query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gpu.select_columns_matmul`, in the precision of `query`."""
    sliced = [rows[:, chosen] for rows, chosen in zip(key, indices.long(), strict=True)]
    return query @ torch.stack(sliced).to(query.dtype).mT


def select_rows_matmul(
    weights: torch.Tensor, value: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """As `kernels.gpu.select_rows_matmul`, in the precision of `weights`."""
    pairs = zip(value, indices.long(), strict=True)
    sliced = [rows[:, chosen] for rows, chosen in pairs]
    return weights @ torch.stack(sliced).to(weights.dtype)


def _best(scores: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest; of equals the lowest positions, NaN last."""
    scores = scores.double().nan_to_num(nan=-1.0, posinf=torch.inf)
    in_order = positions.argsort()
    best = scores[in_order].argsort(descending=True, stable=True)[:count]
    return in_order[best]


def select_prompt(
    scores: torch.Tensor,
    competes: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
    start: int,
    num_stored: int,
    num_core: int = 0,
    row_tokens: torch.Tensor | None = None,
    core_list: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.gpu.select_prompt`."""
    slots = torch.arange(len(competes))
    candidates = slots[competes]
    best = candidates[_best(scores[competes], candidates, num_stored)]
    stays = ~competes
    stays[best] = True
    source, target = slots[stays & (slots < start)], slots[~stays & (slots >= start)]
    tokens = torch.where(competes, 2 * slots, ~slots)
    tokens[best[:num_core]] += 1
    tokens[target] = tokens[source]
    if row_tokens is not None and core_list is not None:
        rows = blocks.long()[slots // block_size] * block_size + slots % block_size
        row_tokens[rows[start:]] = tokens[start:].int()
        listed = slots[((tokens < 0) | (tokens % 2 == 1)) & (slots >= start)]
        core_list[rows[start : start + len(listed)]] = listed.int()
    num_moves = min(start, len(slots) - start)
    padding = torch.full((num_moves - len(source),), -1)
    return torch.cat([source, padding]).int(), torch.cat([target, padding]).int()


def select_core(
    scores: torch.Tensor,
    row_tokens: torch.Tensor,
    core_list: torch.Tensor,
    num_entered: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    start: torch.Tensor,
    stop: torch.Tensor,
    num_listed: torch.Tensor,
) -> None:
    """As `kernels.gpu.select_core`."""
    for request, length in enumerate(num_listed.tolist()):
        if not length:
            continue
        slots = torch.arange(int(start[request]), int(stop[request]))
        blocks = block_table[request].long()[slots // block_size]
        rows = blocks * block_size + slots % block_size
        tokens = row_tokens[rows]
        competes = tokens >= 0
        positions = tokens[competes] // 2
        total = scores[:, rows[competes]].sum(0)
        best = _best(total, positions, length - int((~competes).sum()))
        chosen = torch.zeros_like(positions)
        chosen[best] = 1
        num_entered += ((chosen == 1) & (tokens[competes] % 2 == 0)).sum()
        tokens[competes] = (2 * positions + chosen).int()
        row_tokens[rows] = tokens
        listed = slots[(tokens < 0) | (tokens % 2 == 1)]
        core_list[rows[:length]] = listed.int()
