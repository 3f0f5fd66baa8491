"""Kernels store, move and list the tokens that policies' tensors do."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from vllm_avl.kernels.gpu import ranking
from vllm_avl.kernels.gpu.compact_blocks import compact_blocks
from vllm_avl.kernels.gpu.exchange_rows import exchange_rows
from vllm_avl.kernels.gpu.select_core import select_core
from vllm_avl.kernels.gpu.select_prompt import select_prompt
from vllm_avl.kernels.gpu.selected_attention import selected_attention
from vllm_avl.kernels.gpu.vision_scores import vision_scores

from vllm_avl.backend.gather import GatherBuffers, gathered_rows
from vllm_avl.backend.introspection import report
from vllm_avl.backend.kernel_layer import KernelLayer
from vllm_avl.backend.layer import Layer
from vllm_avl.backend.ranks import Ranks
from vllm_avl.backend.request import RequestState, Task, Turn
from vllm_avl.backend.triton_cache import TritonCache
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan
from vllm_avl.testing.interpreted import interpreted

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 16, 4, 2, 16
NUM_BLOCKS = 40
SCALE = 4.0
"""Attention far from uniform, so that rounding does not decide who is better."""
PROMPT, VISION = 213, ((5, 85), (100, 190))
SETTINGS = {"vision_store_ratio": 0.5, "executor": "gather"}
CORE = SETTINGS | {"vision_core_ratio": 0.2, "core_refresh_interval": 2}
OPERATIONS = (
    *(compact_blocks, exchange_rows, select_core, select_prompt),
    *(selected_attention, vision_scores),
)


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    modules = {sys.modules[operation.__module__] for operation in OPERATIONS}
    with interpreted(ranking, *modules):
        yield


class Served:
    """One request in one layer, its rows ranked in kernels or by a policy."""

    def __init__(self, in_kernels, num_ranks=1, **settings):
        torch.manual_seed(0)
        plan = make_plan(PROMPT, VISION, BLOCK_SIZE, AVLConfig(**settings))
        self.state = RequestState(plan, has_ranking_kernels=in_kernels)
        assert self.state.ranks_in_kernels == in_kernels
        self.buffers = GatherBuffers(
            num_slots=NUM_BLOCKS * BLOCK_SIZE,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            max_num_seqs=4,
            device=torch.device("cpu"),
            layer_names=["layer"],
        )
        lists = self.buffers.layers["layer"]
        kv_cache = torch.randn(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.cache = TritonCache(
            kv_cache, HEAD_SIZE, SCALE, 0.0, lists.core_list, self.buffers.scores
        )
        blocks = torch.randperm(NUM_BLOCKS - 1)[: PROMPT // BLOCK_SIZE + 5] + 1
        self.blocks = blocks.to(torch.int32)
        # Ranks whose heads see the same.
        ranks = Ranks(
            lambda scores: num_ranks * scores,
            lambda scores, dim: torch.cat([scores] * num_ranks, dim),
        )
        by_kernels = KernelLayer(1, self.cache, lists, ranks)
        by_policy = Layer(1, self.cache, ranks)
        self.layer = by_kernels if in_kernels else by_policy

    def step(self, num_computed, num_tokens):
        """Compute tokens; return the attention of a row that reads a list."""
        torch.manual_seed(num_tokens)
        query = torch.randn(num_tokens - num_computed, NUM_HEADS, HEAD_SIZE)
        turn = Turn(self.state, num_computed, num_tokens)
        output = torch.zeros_like(query)
        if turn.gathers:
            common = SimpleNamespace(
                num_reqs=1,
                max_query_len=1,
                block_table_tensor=self.blocks.unsqueeze(0),
                seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
                query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            )
            rows = gathered_rows(self.buffers, common, [turn])
            cache = self.cache
            rows.attend("layer", query, cache.keys, cache.values, SCALE, 0.0, output)
        self.state.record(num_tokens, turn.scores)
        if turn.has_work:
            ids = self.blocks[: -(-num_tokens // BLOCK_SIZE)]
            task = Task(self.state, num_computed, num_tokens, 0, ids, turn.gathers)
            rest = () if self.state.ranks_in_kernels else (output,)
            self.layer.perform(task, query, *rest)
        return output

    def told(self):
        """Core, secondary, evicted and text."""
        (layer,) = report("r", self.state).layers
        return layer.core, layer.secondary, layer.evicted, layer.text

    def stored(self):
        """Keys and values of the blocks that stay, bit by bit."""
        return self.cache.kv_cache[self.blocks[self.state.plan.private_from :].long()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"observation_window": 1},
        {"vision_store_ratio": 1.0},
        {"refresh_all_ranks": True},
        {"num_ranks": 2, "refresh_all_ranks": True},
    ],
    ids=["plain", "one-row", "all-stored", "all-ranks", "two-ranks"],
)
def test_every_step_reads_what_a_policy_would_have_chosen(settings):
    by_policy, ours = (Served(kind, **(CORE | settings)) for kind in (False, True))
    # A prompt, ordinary steps and refreshes, then a replay and what follows it.
    lengths = [0, PROMPT, *range(PROMPT + 1, PROMPT + 6), PROMPT + 9, PROMPT + 10]
    cores = []
    for num_computed, num_tokens in pairwise(lengths):
        expected = by_policy.step(num_computed, num_tokens)
        torch.testing.assert_close(ours.step(num_computed, num_tokens), expected)
        assert ours.told() == by_policy.told()
        cores.append(ours.told()[0])
    assert cores[0] == cores[1] != cores[2] == cores[3] != cores[4] == cores[5]
    assert cores[5] != cores[6]
    assert torch.equal(ours.stored(), by_policy.stored())


def test_rows_that_enter_core_are_counted_on_the_device():
    ours = Served(True, **CORE)
    ours.step(0, PROMPT)
    before = set(ours.told()[0][0])
    ours.step(PROMPT + 1, PROMPT + 2)
    entered = set(ours.told()[0][0]) - before
    assert 0 < len(entered) == ours.buffers.num_entered.item()


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_without_core_the_same_rows_stay_in_the_same_slots(reduction):
    settings = SETTINGS | {"head_reduction": reduction}
    by_policy, ours = (Served(kind, num_ranks=2, **settings) for kind in (False, True))
    for served in (by_policy, ours):
        before = served.stored().clone()
        served.step(0, PROMPT)
        assert not torch.equal(served.stored(), before)
    assert torch.equal(ours.stored(), by_policy.stored())


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "fastv"},
        {"policy": "h2o"},
        {"policy": "random"},
        {"text_keep_ratio": 0.5},
        {"introspection": 1},
        {"executor": "pack"},
        {"head_reduction": "max"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_what_kernels_do_not_rank_is_left_to_policies(settings):
    plan = make_plan(PROMPT, VISION, BLOCK_SIZE, AVLConfig(**(CORE | settings)))
    assert not RequestState(plan, has_ranking_kernels=True).ranks_in_kernels
