"""Queries of a KV head as products read them."""

from __future__ import annotations

from numba import types
from vllm_avl.kernels.cpu.threads import array_at, compiled
from vllm_avl.kernels.cpu.vectors import LANES, load_as, multiply, splat, store


@compiled
def lay_queries(
    query: int, row_step: int, code: int, scale: float, rows: int, size: int, to: int
) -> None:
    """Write rows of a head, times `scale`, as fp32 [head_size, rows].

    Args:
        query: address of the first row; the next is `row_step` bytes further.
        code: of the queries' dtype, of `CODES`.
        to: address; a row of scratch lies behind what is written.
    """
    itemsize = 4 if code == 0 else 2
    laid = array_at(to, types.float32, (size, rows))
    kept_at = to + 4 * size * rows
    kept = array_at(kept_at, types.float32, (size,))
    for row in range(rows):
        for d in range(0, size, LANES):
            vector = load_as(query + row * row_step + d * itemsize, code)
            store(kept_at + 4 * d, multiply(vector, splat(scale)))
        for d in range(size):
            laid[d, row] = kept[d]
