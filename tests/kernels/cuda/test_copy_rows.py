"""Copied rows, bit by bit, from and to any blocks."""

import sys

import pytest
import torch
from poisoned import DEVICE, assert_same_bits, paged, runnable
from vllm_avl.kernels.cuda import reference
from vllm_avl.kernels.cuda.copy_rows import copy_rows

MODULE = sys.modules[copy_rows.__module__]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
NUM_TOKENS, BLOCK_SIZE = 96, 16


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE):
        yield


def assert_copied(
    dtype, source, target=None, shape=(2, 64), layout="NHD", in_place=False
):
    """Copy slots of a sequence's blocks to others', or among them, as the oracle."""
    torch.manual_seed(0)
    keys, _, blocks = paged(NUM_TOKENS, *shape, BLOCK_SIZE, dtype, layout)
    cache = keys.as_strided(
        (*keys.shape[:3], 2 * shape[1]), keys.stride(), keys.storage_offset()
    )
    others = [b for b in range(len(cache)) if b not in blocks.tolist()]
    targets = blocks if in_place else torch.tensor(others)
    expected = cache.cpu().clone()
    given = torch.as_tensor(source).int(), None
    if target is not None:
        given = given[0], torch.as_tensor(target).int()
    reference.copy_rows(
        expected, blocks.cpu(), given[0], targets.cpu(), given[1], in_place=in_place
    )
    source, target = (x if x is None else x.to(DEVICE) for x in given)
    ids = blocks.int(), targets.int().to(DEVICE)
    copy_rows(cache, ids[0], source, ids[1], target, in_place=in_place)
    assert_same_bits(cache, expected)


torch.manual_seed(1)
SLOTS = [
    pytest.param([[5]], id="one"),
    pytest.param([list(range(96))], id="all-in-order"),
    pytest.param([torch.randperm(96)[:57].tolist()], id="any-order"),
    pytest.param([[7, 7, 90, 7]], id="a-row-twice"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SLOTS)
def test_to_the_first_slots_of_other_blocks(source, dtype):
    assert_copied(dtype, source)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("shape", [(3, 80), (1, 256), (2, 32)], ids=str)
def test_head_sizes_and_layouts(shape, layout):
    assert_copied(
        torch.bfloat16, [torch.randperm(96)[:50].tolist()], None, shape, layout
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_heads_on_their_own(in_place):
    source, target = (
        torch.stack([torch.randperm(96)[:40] for _ in range(3)]) for _ in range(2)
    )
    assert_copied(torch.float16, source, target, (3, 64), "HND", in_place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "source",
    [torch.randperm(96), torch.arange(95, -1, -1), torch.arange(96).roll(1)],
    ids=["permutation", "reversal", "one-on"],
)
def test_in_place_all_rows_are_read_first(source, dtype):
    assert_copied(dtype, source[None], in_place=True)


def test_a_row_onto_itself_is_padding():
    source = [[3, 0, 0, 0], [0, 0, 0, 0]]
    target = [[70, 0, 0, 0], [0, 0, 0, 0]]
    assert_copied(torch.float32, source, target, in_place=True)
