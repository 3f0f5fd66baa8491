"""The oracle of every GPU kernel of ours, as obvious as the one of the CPU's."""

from __future__ import annotations

import torch


def vision_scores(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.cuda.vision_scores`, in the precision of `query`."""
    num_rows, num_heads, _ = query.shape
    group = num_heads // key_cache.shape[1]
    scores = query.new_zeros(num_heads, num_tokens)
    keys = _rows(key_cache.to(query.dtype), blocks.long(), num_tokens)
    if k_scale is not None:
        keys = keys * k_scale.to(query.dtype)
    for row in range(num_rows):
        visible = num_tokens - num_rows + 1 + row
        for head in range(num_heads):
            seen = keys[:visible, head // group]
            scores[head, :visible] += _attend(query[row, head], seen, scale, soft_cap)
    return scores


def _attend(
    query: torch.Tensor, keys: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    """[num_keys] attention probabilities of one row and head."""
    logits = keys @ query * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return torch.exp(logits - torch.logsumexp(logits, 0))


def _rows(cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_tokens, num_kv_heads, head_size] of one sequence."""
    return cache[blocks].transpose(1, 2).flatten(0, 1)[:num_tokens]


def copy_rows(
    kv_cache: torch.Tensor,
    source_blocks: torch.Tensor,
    source: torch.Tensor,
    target_blocks: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    in_place: bool = False,
) -> None:
    """As `kernels.cuda.copy_rows`."""
    _, num_kv_heads, block_size, _ = kv_cache.shape
    before = kv_cache.clone() if in_place else kv_cache
    for head in range(num_kv_heads):
        old = source[min(head, len(source) - 1)].tolist()
        new = range(len(old))
        if target is not None:
            new = target[min(head, len(target) - 1)].tolist()
        for i, j in zip(old, new, strict=True):
            row = before[source_blocks[i // block_size], head, i % block_size]
            kv_cache[target_blocks[j // block_size], head, j % block_size] = row


def _best(scores: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest; of equals the lowest positions, NaN last."""
    scores = scores.double().nan_to_num(nan=-1.0, posinf=torch.inf)
    in_order = positions.argsort()
    best = scores[in_order].argsort(descending=True, stable=True)[:count]
    return in_order[best]


def rank_rows(
    scores: torch.Tensor,
    core_scores: torch.Tensor,
    num_stored: int,
    num_core: int,
) -> torch.Tensor:
    """As `kernels.cuda.rank_rows`."""
    chosen = []
    for of_stored, of_core in zip(scores, core_scores, strict=True):
        stored = _best(of_stored, torch.arange(len(of_stored)), num_stored)
        core = stored[_best(of_core[stored], stored, num_core)]
        others = stored[~torch.isin(stored, core)]
        chosen.append(torch.cat([core.sort().values, others.sort().values]))
    return torch.stack(chosen).int()


def select_core(
    scores: torch.Tensor,
    row_tokens: torch.Tensor,
    core_list: torch.Tensor,
    num_entered: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    stop: torch.Tensor,
    num_listed: torch.Tensor,
) -> None:
    """As `kernels.cuda.select_core`."""
    for request, length in enumerate(num_listed.tolist()):
        if not length:
            continue
        slots = torch.arange(int(stop[request]))
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
        core_list[:, rows[:length]] = listed.int()
