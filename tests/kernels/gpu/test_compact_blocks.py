"""Moved rows, bit by bit, however sources and targets overlap.

The interpreter runs a program's loads before its stores with or without the barrier
between them: test_compiled.py looks for it in the machine code.
"""

import sys
from functools import partial

import pytest
import torch
from poisoned import assert_moved, paged, runnable
from vllm_avl.kernels.gpu import reference
from vllm_avl.kernels.gpu.compact_blocks import compact_blocks

MODULE = sys.modules[compact_blocks.__module__]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE):
        yield


assert_compacted = partial(assert_moved, compact_blocks, reference.compact_blocks)


torch.manual_seed(1)
MOVES = [
    pytest.param([0, 5, 40], [70, 64, 90], id="scattered"),
    pytest.param([95], [0], id="one"),
    pytest.param(list(range(60)), list(range(30, 90)), id="overlap-up"),
    pytest.param(list(range(30, 90)), list(range(60)), id="overlap-down"),
    pytest.param([3, 60, 9], [60, 9, 77], id="chain"),
    pytest.param([3, 60, 9, 10], [60, 3, 10, 9], id="swaps"),
    pytest.param(list(range(96)), torch.randperm(96).tolist(), id="permutation"),
    pytest.param([7, 7, 7], [1, 2, 7], id="copies"),
    pytest.param([], [], id="nothing"),
    pytest.param([-1, 5, 8, -1], [70, -1, 9, -1], id="padding"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_equals_reference(source, target, dtype):
    assert_compacted((96, 2, 64, 32), dtype, "NHD", (source, target, None))


@pytest.mark.parametrize("tile", [(16, 32, 4), (16, 16, 4)])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param((97, 2, 80, 16), "HND", id="head-80-block-plus-1"),
        pytest.param((200, 1, 256, 128), "NHD", id="head-256-block-128"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_long_lists_in_parts(shape, layout, dtype, tile, monkeypatch):
    monkeypatch.setattr(MODULE, "TILES", [tile])
    source = torch.randperm(96)
    assert_compacted(shape, dtype, layout, (source[:40], source[40:80], None))


def test_rows_that_move_up_may_be_many_if_the_last_come_first(monkeypatch):
    monkeypatch.setattr(MODULE, "TILES", [(16, 32, 4)])
    kept = torch.randperm(96)[:60].sort().values.flip(0)
    target = torch.arange(36, 96).flip(0)
    assert_compacted((96, 2, 64, 32), torch.float16, "NHD", (kept, target, None))


@pytest.mark.parametrize(
    ("num_moves", "rows"), [(256, 256), (257, 2048), (2049, 4096), (5000, 4096)]
)
def test_the_smallest_tile_that_holds_all_is_taken(num_moves, rows, monkeypatch):
    taken = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: taken.update(constants)

    monkeypatch.setattr(MODULE, "_compact_blocks_kernel", Kernel())
    keys, values, blocks = paged(20, 1, 64, 16, torch.float16)
    moves = torch.zeros(num_moves, dtype=torch.int32)
    compact_blocks(keys, values, blocks, moves, moves)
    assert taken["rows"] == rows
    assert rows <= MODULE.ROWS_AT_A_TIME


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_heads_move_on_their_own(layout):
    moves = ([0, 5, 40, 33, 5, -1], [70, 64, 0, 5, 40, 9], [0, 2, 2, 1, 0, 1])
    assert_compacted((96, 3, 64, 32), torch.bfloat16, layout, moves)


def test_heads_overlap_on_their_own():
    heads = torch.arange(3).repeat_interleave(96)
    mixed = torch.randperm(288)
    source = torch.arange(96).repeat(3)[mixed]
    target = torch.cat([torch.randperm(96) for _ in range(3)])[mixed]
    shape = (96, 3, 64, 32)
    assert_compacted(shape, torch.float16, "HND", (source, target, heads[mixed]))
