"""On a device nobody waits for a number: selection runs on tensors without values.

Fake tensors refuse whatever needs a value on the host: a length that depends on data,
an element as a number, a branch.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from vllm_avl.config import AVLConfig
from vllm_avl.plan import Compaction, make_plan
from vllm_avl.worker.cuda.cache import CUDACache
from vllm_avl.worker.cuda.core_lists import CoreLists
from vllm_avl.worker.layer import Layer
from vllm_avl.worker.ranks import Ranks
from vllm_avl.worker.request import Kernels
from vllm_avl.worker.step import WorkerRequests
from vllm_avl.worker.view import make_tasks, stored_table

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 8, 4, 2, 16
NUM_BLOCKS, DEVICE = 64, "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, VISION = 101, ((5, 45), (50, 90))
ALONE = Ranks(lambda scores: scores, lambda scores, dim: scores)


class DeviceCache(CUDACache):
    """A cache on a device whose kernels do nothing but name their results."""

    def score(self, query, blocks, num_tokens, output=None):
        return torch.rand(NUM_HEADS, num_tokens, device=query.device)

    def rank(self, scores, core_scores, num_stored, num_core, candidates, fixed):
        shape = len(scores), len(fixed) + num_stored
        return torch.zeros(shape, dtype=torch.int32, device=scores.device)

    def copy(
        self, source_blocks, source, target_blocks, target=None, *, in_place=False
    ):
        for slots in (source, target):
            assert slots is None or slots.dtype == torch.int32
        self.copied.append(source.shape)


class WaitingCache(DeviceCache):
    """A cache that asks how many rows stay."""

    def rank(self, scores, core_scores, num_stored, num_core, candidates, fixed):
        return (scores > core_scores.mean()).nonzero()[:, 1:].T


def new_cache(kind=DeviceCache):
    lists = CoreLists(
        NUM_BLOCKS * BLOCK_SIZE,
        NUM_HEADS,
        NUM_KV_HEADS,
        NUM_KV_HEADS,
        4,
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        ["layer"],
    )
    shape = NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
    cache = kind(
        torch.zeros(shape, device=DEVICE), HEAD_SIZE, 1.0, 0.0, "layer", lambda _: lists
    )
    object.__setattr__(cache, "copied", [])
    return cache


def answer(policy, cache, num_copied=0, lengths=range(PROMPT, PROMPT + 60), **settings):
    """A prompt, refreshes, and further tokens until text leaves."""
    settings = {"store_ratio": 0.6, "core_ratio": 0.2} | settings
    config = AVLConfig(policy=policy, refresh_interval=2, **settings)
    plan = make_plan(PROMPT, VISION, BLOCK_SIZE, config)
    told = Compaction(
        plan, (*range(40, 40 + plan.num_stored_blocks),), False, num_copied
    )
    kernels = Kernels(choose_core=True, num_lists=2)
    requests = WorkerRequests(1, DEVICE, kernels, BLOCK_SIZE)
    requests.update((), (), {"r": told})
    table = torch.arange(32, dtype=torch.int32, device=DEVICE).unsqueeze(0)
    for num_computed in (0, *lengths):
        num_new = 1 if num_computed else PROMPT
        step = requests.begin({"r": num_computed}, {"r": num_new}, lambda: ["r"])
        rows = step.rows()
        stored = stored_table(rows, table, BLOCK_SIZE)
        query = torch.rand(num_new, NUM_HEADS, HEAD_SIZE, device=DEVICE)
        for task in make_tasks(rows, table, stored, [0, num_new], BLOCK_SIZE):
            Layer("l.1", cache, ALONE).perform(task, query, torch.empty_like(query))
        step.end()
    state = requests.running["r"]
    requests.update(["r"], (), {})
    return state


def fake():
    # Arrays of a step become tensors of their own on the host.
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("text", [{}, {"text_keep_ratio": 0.3}], ids=["", "text"])
@pytest.mark.parametrize(
    "policy", ["avl", "h2o", "fastv", "snapkv", "streaming", "random"]
)
def test_nothing_waits_for_a_device(policy, text):
    with fake():
        cache = new_cache()
        state = answer(policy, cache, **text)
    num_evictions = state.plan.num_evicted_text_blocks(PROMPT + 60) if text else 0
    assert len(cache.copied) >= 1 + (num_evictions > 1)
    assert policy not in ("avl", "h2o", "random") or state.num_refreshes > 5


@pytest.mark.parametrize(
    "settings",
    [
        {"head_reduction": "max"},
        {"refresh_all_ranks": True},
        {"store_ratio": 1.0, "num_copied": 12},
        {"store_ratio": 1.0, "num_copied": 3},
        {"introspection": 2, "lengths": ()},
    ],
    ids=str,
)
def test_nor_do_settings_that_take_other_ways(settings):
    with fake():
        cache = new_cache()
        answer("avl", cache, **settings)
    (copied,) = cache.copied
    assert copied == (1, BLOCK_SIZE * settings.get("num_copied", copied[1] // 8))


def test_a_number_of_rows_that_is_counted_would_wait():
    waits = DynamicOutputShapeException, DataDependentOutputException
    with fake(), pytest.raises(waits):
        answer("avl", new_cache(WaitingCache))
