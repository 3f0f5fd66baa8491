"""Queries of a KV head as products read them."""

from __future__ import annotations

from numba import types
from vllm_avl.kernels.cpu.threads import compiled, read, write
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
    kept = to + 4 * size * rows
    for row in range(rows):
        for d in range(0, size, LANES):
            vector = load_as(query + row * row_step + d * itemsize, code)
            store(kept + 4 * d, multiply(vector, splat(scale)))
        for d in range(size):
            write(to, types.float32, d * rows + row, read(kept, types.float32, d))
