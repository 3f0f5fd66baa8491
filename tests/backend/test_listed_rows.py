"""Which rows of a step our kernel attends on a CPU, and what they read."""

import pytest
import torch

from vllm_avl.backend.cpu_cache import CPUCache
from vllm_avl.backend.listed import GATHER_BELOW, listed_rows
from vllm_avl.backend.request import RequestState, Turn
from vllm_avl.backend.rows import LayerRows
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan

BLOCK_SIZE, PROMPT, VISION = 8, 101, ((5, 45), (50, 90))
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 16


def state_of(**settings):
    config = AVLConfig(
        **{"vision_store_ratio": 0.5, "vision_core_ratio": 0.2, **settings}
    )
    plan = make_plan(PROMPT, VISION, BLOCK_SIZE, config)
    return RequestState(plan, gather_below=GATHER_BELOW)


def listed(turns, starts):
    table = torch.arange(100 * len(turns), dtype=torch.int32).view(len(turns), 100)
    return listed_rows(turns, table, starts, BLOCK_SIZE)


@pytest.mark.parametrize(
    ("settings", "lists"),
    [
        ({"core_refresh_interval": GATHER_BELOW - 1}, True),
        ({"core_refresh_interval": GATHER_BELOW}, False),
        ({"core_refresh_interval": GATHER_BELOW, "executor": "gather"}, True),
        ({"core_refresh_interval": 1, "executor": "pack"}, False),
        ({"core_refresh_interval": 3, "text_keep_ratio": 0.3}, False),
        ({"core_refresh_interval": 3, "head_reduction": "max"}, False),
        ({"core_refresh_interval": 3, "policy": "h2o"}, False),
        ({"core_refresh_interval": 3, "policy": "fastv"}, False),
    ],
)
def test_core_is_listed_where_refreshes_are_frequent(settings, lists):
    assert state_of(**settings).lists_core is lists


def test_nothing_is_listed_where_the_worker_does_not_say_so():
    assert not RequestState(state_of().plan).lists_core


def test_only_decode_rows_with_lists_are_ours():
    ours, packed = state_of(), state_of(executor="pack")
    turns = [
        None,
        Turn(ours, 0, 50),
        Turn(ours, 0, PROMPT),
        Turn(packed, PROMPT, PROMPT + 1),
        Turn(ours, PROMPT, PROMPT + 4),
    ]
    assert listed(turns, [0, 1, 51, 152, 153]) is None
    rows = listed([*turns, Turn(ours, PROMPT, PROMPT + 1)], [0, 1, 51, 152, 153, 157])
    (row,) = rows.rows
    assert row.state is ours
    assert row.token == 157 == rows.tokens.item()
    assert not rows.is_whole_step
    assert listed([Turn(ours, PROMPT, PROMPT + 1)], [0]).is_whole_step


def test_a_row_reads_its_mask_between_refreshes_and_all_on_one():
    state = state_of(core_refresh_interval=2)
    first = state.plan.private_from * BLOCK_SIZE
    mask = torch.zeros(state.plan.num_full_tokens - first, dtype=torch.bool)
    state.layers[3] = LayerRows(first, torch.arange(first, PROMPT)[None], listed=mask)
    for num_tokens, expected in ((PROMPT + 1, mask), (PROMPT + 2, None)):
        (row,) = listed([Turn(state, num_tokens - 1, num_tokens)], [0]).rows
        read = row.of_layer(3)
        assert read.mask is expected
        assert row.scores is (expected is None)
        assert read.num_tokens == num_tokens - first
        last = -(-num_tokens // BLOCK_SIZE)
        assert read.blocks.tolist() == list(range(first // BLOCK_SIZE, last))


def test_attention_is_written_where_the_row_lies_and_remembered_for_refreshes():
    torch.manual_seed(0)
    state = state_of(core_refresh_interval=2)
    first = state.plan.private_from * BLOCK_SIZE
    mask = torch.rand(state.plan.num_full_tokens - first) < 0.5
    state.layers[0] = LayerRows(first, torch.arange(first, PROMPT)[None], listed=mask)
    turns = [None, Turn(state, PROMPT, PROMPT + 1), Turn(state, PROMPT + 1, PROMPT + 2)]
    rows = listed(turns, [0, 2, 3])
    shape = 300, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
    cache = CPUCache(torch.randn(shape), HEAD_SIZE, 0.25, 0.0)
    query = torch.randn(4, NUM_HEADS, HEAD_SIZE)
    output = torch.full_like(query, torch.nan)
    paid = rows.attend(0, cache, query, output)
    assert output[:2].isnan().all()
    assert list(paid) == [3]
    one, other = (row.of_layer(0) for row in rows.rows)
    alone, everything = cache.attend(query[3], other.blocks, other.num_tokens)
    assert torch.allclose(output[3], alone, atol=1e-6)
    assert torch.allclose(paid[3], everything, atol=1e-6)
    assert torch.allclose(output[2], cache.select(query[2:3], [one]).output[0])
    assert not torch.allclose(
        output[2], cache.attend(query[2], one.blocks, one.num_tokens)[0], atol=1e-3
    )
