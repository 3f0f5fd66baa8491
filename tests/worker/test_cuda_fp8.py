"""An fp8 cache on CUDA is scored, read and moved as the numbers that it stands for."""

import pytest
import torch
from served import MODULES
from vllm_avl.kernels.cuda import selected_rows, splits

from benchmarks.testing.interpreted import interpreted
from vllm_avl.worker.cuda.cache import CUDACache, Scales
from vllm_avl.worker.cuda.core_lists import CoreLists
from vllm_avl.worker.cuda.listed_rows import ListedRows

FP8 = torch.float8_e4m3fn
BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, NUM_BLOCKS = 16, 4, 2, 32, 12
NUM_TOKENS, SCALE = 70, 0.3
SCALES = Scales(*(torch.tensor(scale) for scale in (0.25, 0.5, 3.0)))


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with interpreted(*MODULES, selected_rows, splits):
        yield


class Caches:
    """One layer's cache in fp8, and in fp32 what it stands for."""

    def __init__(self):
        torch.manual_seed(0)
        shape = NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        codes = (torch.randn(shape) * 4).to(FP8)
        # Nobody reads the null block.
        codes[0] = torch.nan
        self.blocks = torch.randperm(NUM_BLOCKS - 1).int() + 1
        self.lists = CoreLists(
            NUM_BLOCKS * BLOCK_SIZE,
            NUM_HEADS,
            NUM_KV_HEADS,
            1,
            1,
            torch.zeros(1, dtype=torch.int32),
            ["layer"],
        )
        self.fp8 = self.cache(codes, SCALES)
        self.fp32 = self.cache(self.numbers(codes), None)

    def cache(self, kv_cache, scales):
        lists = "layer", lambda _: self.lists
        return CUDACache(kv_cache, HEAD_SIZE, SCALE, 0.0, *lists, scales)

    def numbers(self, codes):
        """What codes stand for, [..., 2 * HEAD_SIZE] fp32."""
        keys, values = codes.float().split(HEAD_SIZE, -1)
        return torch.cat([keys * SCALES.key, values * SCALES.value], -1)

    def query(self, num_rows, is_quantised):
        """A query as vLLM hands it over, and in fp32."""
        query = torch.randn(num_rows, NUM_HEADS, HEAD_SIZE) * 3
        if is_quantised:
            codes = (query / SCALES.query).to(FP8)
            return codes, codes.float() * SCALES.query
        return query.half(), query.half().float()


QUERIES = pytest.mark.parametrize("is_quantised", [True, False])


@QUERIES
def test_scores(is_quantised):
    caches = Caches()
    codes, numbers = caches.query(5, is_quantised)
    ours = caches.fp8.score(codes, caches.blocks, NUM_TOKENS)
    exact = caches.fp32.score(numbers, caches.blocks, NUM_TOKENS)
    assert exact.amax() > 0.5
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


@QUERIES
@pytest.mark.parametrize("tokens", [None, torch.tensor([0])])
def test_rows_of_our_kernel(is_quantised, tokens):
    caches = Caches()
    codes, numbers = caches.query(1, is_quantised)
    row_slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    outputs, scores = [], []
    for cache, query in ((caches.fp8, codes), (caches.fp32, numbers)):
        lists = caches.lists
        lists.scores.zero_()
        lists.core_list["layer"][0] = (row_slots % 40 + 1).int()
        rows = ListedRows(
            lists,
            caches.blocks[None],
            torch.tensor([NUM_TOKENS], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
            1,
            # From slot 48 on, 9 listed ones, scored.
            torch.tensor([[48], [9], [1], [0], [0]], dtype=torch.int32),
            chooses=False,
            tokens=tokens,
        )
        output = torch.full(query.shape, torch.nan)
        rows.attend(cache, query, output)
        outputs.append(output)
        scores.append(lists.scores.clone())
    # Probabilities are rounded to fp16 before they meet the values.
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3 * 12 * 3)
    assert scores[1].amax() > 0.5
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)


def test_rows_that_policies_look_at():
    caches, slots = Caches(), torch.tensor([3, 68, 17, 40])
    ours = caches.fp8.rows(caches.blocks, slots)
    for one, other in zip(ours, caches.fp32.rows(caches.blocks, slots), strict=True):
        assert one.shape == (NUM_KV_HEADS, len(slots), HEAD_SIZE)
        assert torch.equal(one, other)


def test_rows_move_bit_by_bit():
    caches = Caches()
    slots = torch.tensor([[3, 68, 17, 40]], dtype=torch.int32)
    before = caches.fp8.kv_cache.clone()
    to = caches.blocks[6:8]
    caches.fp8.copy(caches.blocks, slots, to)
    for place, slot in enumerate(slots[0].tolist()):
        source = before[caches.blocks[slot // BLOCK_SIZE], :, slot % BLOCK_SIZE]
        moved = caches.fp8.kv_cache[to[0], :, place]
        assert torch.equal(moved.view(torch.uint8), source.view(torch.uint8))
