"""Softmax of rows in pieces, each with the largest logit and the sum that it took."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm_avl.kernels.cpu.threads import compiled
from vllm_avl.kernels.cpu.vectors import (
    LANES,
    add,
    exponential,
    larger,
    largest_of,
    load,
    multiply,
    splat,
    store,
    subtract,
    sum_of,
    tanh,
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
def exponentiate(logits: int, count: int, norm: Any) -> None:
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
    norm[0], norm[1] = largest, sum_of(total)


@compiled
def finite(largest: float) -> float:
    """What logits are reduced by: 0 where the largest of them is -inf."""
    return np.float32(0) if largest == -np.inf else largest


@compiled
def scaled(factor: float, from_: float, to: float) -> float:
    """A factor's weight when a piece whose largest logit is `from_` joins others."""
    return factor * largest_of(exponential(splat(np.float32(from_ - to))))
