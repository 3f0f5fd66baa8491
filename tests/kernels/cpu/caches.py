"""What the tests of CPU loops share: poisoned caches, and how far off a loop may be."""

import sys

import torch
from vllm_avl.kernels.cpu import reference
from vllm_avl.kernels.cpu.vectors import ELEMENTS, FP8

DTYPES = list(ELEMENTS)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def query_dtype(dtype):
    """The dtype of queries beside a cache."""
    return torch.bfloat16 if dtype == FP8 else dtype


def scales(dtype):
    """Scales of keys and values: powers of two, so that eager code is as exact."""
    return {"k_scale": 0.5, "v_scale": 4.0} if dtype == FP8 else {}


def shuffled_blocks(lengths, block_size):
    """[num_rows, max_blocks + 1] ids, none twice nor 0, and one more than all of them.

    Lines are strided, and ids behind a row's own would lead out of the cache.
    """
    counts = [-(-length // block_size) for length in lengths]
    table = torch.full((len(counts), max(counts) + 1), 1 << 30, dtype=torch.int32)
    ids = torch.randperm(sum(counts), dtype=torch.int32) + 1
    for line, own in zip(table, ids.split(counts), strict=True):
        line[: len(own)] = own
    return table, sum(counts) + 1


def poisoned(num_blocks, num_kv_heads, block_size, head_size, dtype):
    """A cache of NaN."""
    shape = num_blocks, num_kv_heads, 2, block_size * head_size
    return torch.full(shape, torch.nan, dtype=dtype)


def write(kv_cache, blocks, slots, head_size, heads=slice(None)):
    """Write random keys and values to slots of a sequence."""
    for half in reference.split(kv_cache, head_size):
        where = blocks[slots // half.shape[2]].long(), heads, slots % half.shape[2]
        half[where] = torch.randn(half[where].shape).to(half.dtype)


def within_twice_eager(ours, eager, exact):
    """Whether our error is at most twice eager's, and a few ulp of fp32."""
    budget = 2 * (eager.double() - exact).abs().max() + 4e-7 * exact.abs().max()
    return (ours.double() - exact).abs().max() <= budget


def without_pairs(monkeypatch, operation):
    """Let an operation widen elements, as on processors without pairs of them."""
    module = sys.modules[operation.__module__]
    monkeypatch.setattr(module, "is_paired", lambda query, cached: False)


def bits(tensor):
    return tensor.view(BITS[tensor.element_size()])
