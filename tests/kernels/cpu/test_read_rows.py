"""Rows that are read out are those that were written, however they lie."""

import pytest
import torch
from test_packed import packed
from vllm_avl.kernels.cpu import read_rows, reference
from vllm_avl.kernels.cpu.vectors import FP8

NUM_BLOCKS, NUM_KV_HEADS, NUM_TOKENS = 7, 3, 130


@pytest.mark.parametrize("lies_packed", [False, True], ids=["by-column", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("head_size", [16, 48])
@pytest.mark.parametrize("block_size", [32, 96])
def test_rows_of_shuffled_blocks(block_size, head_size, dtype, lies_packed):
    torch.manual_seed(0)
    keys, values = torch.randn(2, NUM_TOKENS, NUM_KV_HEADS, head_size).to(dtype)
    shape = NUM_BLOCKS, NUM_KV_HEADS, 2, block_size * head_size
    cache = torch.full(shape, torch.nan).to(dtype)
    blocks = torch.randperm(NUM_BLOCKS - 1, dtype=torch.int32) + 1
    token = torch.arange(NUM_TOKENS)
    block, slot = blocks[token // block_size].long(), token % block_size
    for half, rows in zip(
        reference.split(cache, head_size), (keys, values), strict=True
    ):
        half[block, :, slot] = rows
    if lies_packed:
        cache = packed(cache, head_size)
    slots = torch.tensor([0, 1, 15, 16, 31, 33, 64, 97, 129])
    found = read_rows(cache, head_size, blocks, slots, packed=lies_packed)
    for ours, rows in zip(found, (keys, values), strict=True):
        assert torch.equal(ours, rows[slots].transpose(0, 1).float())
