"""Exchanged rows, bit by bit, and nothing but them."""

import sys
from functools import partial

import pytest
import torch
from poisoned import DEVICE, assert_moved, assert_same_bits, paged, runnable
from vllm_avl.kernels.gpu import reference
from vllm_avl.kernels.gpu.exchange_rows import exchange_rows

MODULE = sys.modules[exchange_rows.__module__]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE):
        yield


assert_exchanged = partial(assert_moved, exchange_rows, reference.exchange_rows)


SHAPES = [
    pytest.param(96, 2, 64, 32, "NHD", id="head-64-nhd"),
    pytest.param(96, 3, 80, 16, "HND", id="head-80-hnd"),
    pytest.param(250, 1, 256, 128, "NHD", id="head-256"),
]
ODD = [0, 5, 40, 1, 17, 95, 3, 90, 60, 61, 62, 63, 64, 20, 21, 22, 23, 24, 25, 26]
EVEN = [70, 64 - 31, 33, 2, 18, 94, 4, 89, 50, 51, 52, 53, 54, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "head_size", "block_size", "layout"), SHAPES
)
def test_all_heads(num_tokens, num_kv_heads, head_size, block_size, layout, dtype):
    shape = (num_tokens, num_kv_heads, head_size, block_size)
    assert_exchanged(shape, dtype, layout, (ODD[:8], EVEN[:8], None))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_heads_of_their_own(layout):
    moves = ([0, 0, 5, 40, 33], [70, 5, 64, 0, 5], [0, 2, 0, 1, 1])
    assert_exchanged((96, 3, 64, 32), torch.bfloat16, layout, moves)


@pytest.mark.parametrize("heads", [None, [0, 2, 1, 2, 0]])
def test_padding_is_skipped(heads):
    moves = ([-1, 5, -1, 40, -7], [70, 64, -1, 33, 9], heads)
    assert_exchanged((96, 3, 64, 32), torch.float16, "NHD", moves)


def test_more_pairs_than_a_program_takes():
    used = list(dict.fromkeys(ODD + EVEN))
    count = len(used) // 2
    moves = (used[:count], used[count : 2 * count], None)
    assert_exchanged((96, 2, 256, 16), torch.float32, "NHD", moves)


def test_nothing_to_exchange():
    assert_exchanged((33, 1, 64, 16), torch.float32, "NHD", ([], [], None))


def test_twice_is_none():
    torch.manual_seed(0)
    keys, values, blocks = paged(96, 2, 64, 32, torch.bfloat16)
    before = keys.clone(), values.clone()
    first, second = torch.tensor([0, 5], device=DEVICE), torch.tensor([9, 44])
    for _ in range(2):
        exchange_rows(keys, values, blocks, first, second.to(DEVICE))
    assert_same_bits(keys, before[0])
    assert_same_bits(values, before[1])
