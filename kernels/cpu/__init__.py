"""Attention, ranking and the moving of rows on a CPU, as loops that Numba compiles.

A cache is `[num_blocks, num_kv_heads, 2, block_size · head_size]`, contiguous: a
block's keys by column `[head_size, block_size]`, then its values by row, as vLLM's
kernel lays them out; or both packed in pairs, as its AMX kernel does (`packed.py`).
Block sizes are multiples of 32, head sizes of 16. Elements are bfloat16, float16,
float32 or, where the processor has AVX-512, float8_e4m3fn.
"""

import torch
from numba import types
from vllm_avl.kernels.cpu import attention, scores
from vllm_avl.kernels.cpu import copy_rows as copying
from vllm_avl.kernels.cpu import rank_rows as ranking
from vllm_avl.kernels.cpu.attention import DecodeRows, selected_attention
from vllm_avl.kernels.cpu.copy_rows import copy_rows
from vllm_avl.kernels.cpu.rank_rows import rank_rows
from vllm_avl.kernels.cpu.read_rows import read_rows
from vllm_avl.kernels.cpu.scores import attention_scores
from vllm_avl.kernels.cpu.vectors import ELEMENTS

__all__ = [
    "DecodeRows",
    "attention_scores",
    "copy_rows",
    "rank_rows",
    "read_rows",
    "selected_attention",
    "start",
]


def start(dtype: torch.dtype) -> None:
    """Compile for caches of `dtype`, so that the first request need not wait.

    What has been compiled once is kept on disk, where Numba keeps such things.

    Raises:
        ValueError: where no loop is made for `dtype`.
    """
    if dtype not in ELEMENTS:
        raise ValueError(f"dtype {dtype} is not one of {[*ELEMENTS]}")
    attention.LOOP.start(ELEMENTS[dtype])
    scores.LOOP.start(ELEMENTS[dtype])
    copying.LOOP.start(copying.BITS[dtype.itemsize])
    ranking.LOOP.start(types.float32)
