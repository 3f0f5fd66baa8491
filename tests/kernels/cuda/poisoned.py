"""Caches as vLLM lays them out on a GPU, NaN wherever a kernel has nothing to look for.

With a GPU the kernels are compiled and run there, without one they are interpreted.
"""

import contextlib

import torch

from benchmarks.testing.interpreted import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def runnable(*modules):
    """Context in which the kernels of `modules` run on DEVICE."""
    return contextlib.nullcontext() if DEVICE == "cuda" else interpreted(*modules)


def paged(num_tokens, num_kv_heads, head_size, block_size, dtype, layout="NHD"):
    """Keys, values and shuffled blocks of one sequence; every other slot holds NaN.

    Keys and values are the two halves of a last dimension, as in vLLM.
    """
    num_blocks = -(-num_tokens // block_size)
    blocks = torch.randperm(3 * num_blocks)[:num_blocks] + 1
    shape = [3 * num_blocks + 1, block_size, num_kv_heads, 2 * head_size]
    if layout == "HND":
        shape[1:3] = [num_kv_heads, block_size]
    cache = torch.full(shape, float("nan")).to(dtype)
    view = cache if layout == "HND" else cache.transpose(1, 2)
    position = torch.arange(num_tokens)
    rows = torch.randn(num_tokens, num_kv_heads, 2 * head_size).to(dtype)
    bits = BITS[dtype.itemsize]
    view.view(bits)[blocks[position // block_size], :, position % block_size] = (
        rows.view(bits)
    )
    view = view.to(DEVICE)
    return view[..., :head_size], view[..., head_size:], blocks.to(DEVICE)


def assert_same_bits(ours, expected):
    bits = BITS[ours.dtype.itemsize]
    assert torch.equal(ours.view(bits).cpu(), expected.view(bits).cpu())
