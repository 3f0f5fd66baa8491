"""On a device nobody waits for a number: selection runs on tensors without values.

Fake tensors refuse whatever needs a value on the host: a length that depends on data,
an element as a number, a branch.
"""

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
)

from vllm_avl.backend.layer import Layer
from vllm_avl.backend.ranks import Ranks
from vllm_avl.backend.request import RequestState, Task
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS = 8, 4, 2
PROMPT, VISION = 101, ((5, 45), (50, 90))
ALONE = Ranks(lambda scores: scores, lambda scores, dim: scores)


@dataclass
class DeviceCache:
    """A cache on a device: scores come from a kernel, moves go to one."""

    pads_moves: bool = True
    num_kv_heads: int = NUM_KV_HEADS
    block_size: int = BLOCK_SIZE
    num_moves: int = 0

    def scores(self, query, blocks, num_tokens):
        return torch.rand(NUM_HEADS, num_tokens)

    def move(self, blocks, moves):
        self.num_moves += 1


def answer(policy, cache, **settings):
    """A prompt, a refresh, and further tokens until text leaves."""
    config = AVLConfig(
        policy=policy,
        vision_store_ratio=0.6,
        vision_core_ratio=0.2,
        core_refresh_interval=2,
        **settings,
    )
    state = RequestState(make_plan(PROMPT, VISION, BLOCK_SIZE, config))
    layer = Layer(1, cache, ALONE)
    for num_computed in (0, *range(PROMPT, PROMPT + 60)):
        num_tokens = max(num_computed + 1, PROMPT)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        ids = torch.arange(num_blocks, dtype=torch.int32)
        task = Task(state, num_computed, num_tokens, 0, ids, False)
        state.record(num_tokens, task.scores)
        if task.has_work:
            query = torch.rand(num_tokens - num_computed, NUM_HEADS, 16)
            layer.perform(task, query, query)
    return state


@pytest.mark.parametrize("text", [{}, {"text_keep_ratio": 0.3}])
@pytest.mark.parametrize(
    "policy", ["avl", "h2o", "fastv", "snapkv", "streaming", "random"]
)
def test_nothing_waits_for_a_device(policy, text):
    cache = DeviceCache()
    with FakeTensorMode():
        state = answer(policy, cache, **text)
    assert cache.num_moves > 0
    assert policy not in ("avl", "h2o", "random") or state.num_refreshes > 5


def test_moves_that_are_counted_would_wait():
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        answer("avl", DeviceCache(pads_moves=False))
