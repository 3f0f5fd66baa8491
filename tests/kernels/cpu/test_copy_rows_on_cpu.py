"""Copies of cache rows, bit by bit, against the oracle."""

import pytest
import torch
from caches import bits, shuffled_blocks
from vllm_avl.kernels.cpu import copy_rows, reference

NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 3, 80, 32
DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def make_cache(lengths, dtype, num_kv_heads=NUM_KV_HEADS):
    """Random bits, NaN among them."""
    torch.manual_seed(0)
    table, num_blocks = shuffled_blocks(lengths, BLOCK_SIZE)
    num_bytes = BLOCK_SIZE * HEAD_SIZE * dtype.itemsize
    shape = num_blocks, num_kv_heads, 2, num_bytes
    cache = torch.randint(256, shape, dtype=torch.uint8).view(dtype)
    return cache, table


def slots(num_rankings, size, count):
    """[num_rankings, count] slots below `size`, distinct in a ranking."""
    lines = [torch.randperm(size)[:count] for _ in range(num_rankings)]
    return torch.stack(lines).int()


def check(cache, *arguments, **options):
    expected = cache.clone()
    reference.copy_rows(expected, HEAD_SIZE, *arguments, **options)
    copy_rows(cache, HEAD_SIZE, *arguments, **options)
    assert torch.equal(bits(cache), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("num_rankings", [1, NUM_KV_HEADS])
@pytest.mark.parametrize("has_target", [True, False])
def test_to_another_request(has_target, num_rankings, num_threads, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    cache, table = make_cache([300, 160], dtype)
    source = slots(num_rankings, 300, 150)
    target = slots(num_rankings, 160, 150) if has_target else None
    check(cache, table[0], source, table[1], target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rankings", [1, NUM_KV_HEADS])
@pytest.mark.parametrize("count", [1, 31, 96, 150])
@pytest.mark.parametrize("in_place", [True, False])
def test_slots_that_ascend(in_place, count, num_rankings, dtype):
    """As without core: text, then what stays of vision, both in the prompt's order."""
    cache, table = make_cache([300, 160], dtype)
    source = slots(num_rankings, 300, count).sort(1).values.roll(count // 5, 1)
    targets = table[0, :5].flip(0).contiguous() if in_place else table[1]
    check(cache, table[0], source, targets, in_place=in_place)


def test_rows_of_every_slot_of_a_window():
    cache, table = make_cache([160, 160], torch.bfloat16)
    every = torch.arange(160, dtype=torch.int32)[None]
    check(cache, table[0], every, table[1], in_place=False)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("has_target", [True, False])
def test_within_a_request_every_row_is_read_first(has_target, count):
    cache, table = make_cache([150], torch.bfloat16)
    source = slots(NUM_KV_HEADS, 150, count)
    target = slots(NUM_KV_HEADS, 150, count) if has_target else None
    check(cache, table[0], source, table[0], target)


def test_rows_change_places():
    cache, table = make_cache([150], torch.bfloat16)
    one, other = slots(1, 150, 140).split(70, -1)
    source, target = torch.cat([one, other], -1), torch.cat([other, one], -1)
    check(cache, table[0], source, table[0], target)


def test_requests_that_share_blocks_in_another_order():
    cache, table = make_cache([160, 32], torch.float32)
    target_blocks = torch.cat([table[0, 1:5].flip(0), table[1, :1]])
    check(cache, table[0], slots(NUM_KV_HEADS, 160, 160), target_blocks)


def test_one_head():
    cache, table = make_cache([160, 160], torch.float16, num_kv_heads=1)
    check(cache, table[0], slots(1, 160, 100), table[1])


def test_nothing_to_copy():
    cache, table = make_cache([160], torch.float16)
    check(cache, table[0], slots(1, 160, 0), table[0])
