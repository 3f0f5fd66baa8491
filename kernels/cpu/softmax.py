"""Softmax of rows in pieces, each with the largest logit and the sum that it took."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from vllm_avl.kernels.cpu.elementary import exponential, tanh
from vllm_avl.kernels.cpu.threads import compiled, read, write
from vllm_avl.kernels.cpu.vectors import (
    LANES,
    add,
    larger,
    largest_of,
    load,
    multiply,
    splat,
    store,
    subtract,
    sum_of,
)

STEP = 4 * LANES
"""Bytes of a vector."""


@compiled
def cap(logits: int, count: int, soft_cap: float) -> None:
    """Bound `count` logits by tanh."""
    wide, narrow = splat(soft_cap), splat(np.float32(1) / soft_cap)
    for at in range(logits, logits + 4 * count, STEP):
        store(at, multiply(wide, tanh(multiply(load(at), narrow))))


@compiled
def exponentiate(logits: int, count: int, norm: int) -> None:
    """Turn logits into weights, and leave the largest logit and the weights' sum.

    `count` is a multiple of a vector's lanes. Where every logit is -inf the weights
    are 0. NaN among the logits makes the sum NaN.
    """
    end = logits + 4 * count
    most = splat(np.float32(-np.inf))
    for at in range(logits, end, STEP):
        most = larger(load(at), most)
    largest = largest_of(most)
    shift = splat(finite(largest))
    total = splat(np.float32(0))
    for at in range(logits, end, STEP):
        weight = exponential(subtract(load(at), shift))
        store(at, weight)
        total = add(total, weight)
    write(norm, types.float32, 0, largest)
    write(norm, types.float32, 1, sum_of(total))


@compiled
def finite(largest: Any) -> Any:
    """What logits are reduced by: 0 where the largest of them is -inf."""
    return np.float32(0) if largest == -np.inf else largest


@compiled
def normalise(norms: int, step: int, parts: int) -> None:
    """Replace the largest logit of each part of a row by what normalises the part.

    `norms` is the address of what `exponentiate` left for the first part, and the next
    part's is `step` bytes further.
    """
    largest = np.float32(-np.inf)
    for part in range(parts):
        largest = max(largest, read(norms + part * step, types.float32, 0))
    shift, total = finite(largest), np.float32(0)
    for part in range(parts):
        at = norms + part * step
        distance = np.float32(read(at, types.float32, 0) - shift)
        factor = largest_of(exponential(splat(distance)))
        total += factor * read(at, types.float32, 1)
        write(at, types.float32, 0, factor)
    for part in range(parts):
        at = norms + part * step
        write(at, types.float32, 0, read(at, types.float32, 0) / total)
