"""Core as an index list holds the tokens that packed core holds, layer by layer."""

from dataclasses import dataclass, field

import pytest
import torch

from vllm_avl import kernels
from vllm_avl.backend.introspection import report
from vllm_avl.backend.layer import Layer
from vllm_avl.backend.ranks import Ranks
from vllm_avl.backend.request import RequestState, Task
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 8, 4, 2, 16
SCALE = HEAD_SIZE**-0.5
PROMPT, VISION = 101, ((5, 45), (50, 90))
ALONE = Ranks(lambda scores: scores, lambda scores, dim: scores)


@dataclass
class EagerCache:
    """A cache of plain rows, moved and scored by PyTorch."""

    keys: torch.Tensor
    values: torch.Tensor
    num_kv_heads: int = NUM_KV_HEADS
    block_size: int = BLOCK_SIZE
    pads_moves: bool = False
    seen: torch.Tensor | None = None
    lists: dict = field(default_factory=dict)

    def scores(self, query, blocks, num_tokens):
        return kernels.attention_scores(query, self.keys, blocks, num_tokens, SCALE)

    def move(self, blocks, moves):
        move = kernels.exchange_rows if moves.exchange else kernels.compact_blocks
        pairs = blocks, moves.source, moves.target, moves.heads
        move(self.keys, self.values, *pairs)

    def attend(self, query, task, start):
        """Leave what a kernel would: attention at cache rows, a group's heads added."""
        blocks = task.blocks[start // BLOCK_SIZE :]
        found = self.scores(query, blocks, task.num_tokens - start)
        self.seen = torch.full((NUM_KV_HEADS, len(self.keys) * BLOCK_SIZE), torch.nan)
        slots = torch.arange(start, task.num_tokens)
        rows = task.blocks[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE
        self.seen[:, rows] = found.unflatten(0, (NUM_KV_HEADS, -1)).sum(1)

    def rows(self, blocks, num_slots):
        slots = torch.arange(num_slots)
        return blocks[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE

    def probabilities(self, token, blocks, num_slots):
        return self.seen[:, self.rows(blocks, num_slots)]

    def list_core(self, blocks, in_core, size, start):
        slots = in_core.nonzero().flatten() + start
        rows = self.rows(blocks, size)
        self.lists = dict(zip(rows.tolist(), slots.tolist(), strict=True))


def start(executor, policy="avl"):
    torch.manual_seed(0)
    config = AVLConfig(
        policy=policy,
        vision_store_ratio=0.6,
        vision_core_ratio=0.2,
        core_refresh_interval=2,
        executor=executor,
    )
    plan = make_plan(PROMPT, VISION, BLOCK_SIZE, config)
    shape = 40, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE
    cache = EagerCache(torch.randn(shape), torch.randn(shape))
    return RequestState(plan), Layer(1, cache, ALONE), torch.randperm(40)


def run(state, layer, blocks, num_computed, num_tokens, gathers):
    torch.manual_seed(num_tokens)
    query = torch.randn(num_tokens - num_computed, NUM_HEADS, HEAD_SIZE)
    ids = blocks[: -(-num_tokens // BLOCK_SIZE)].to(torch.int32)
    task = Task(state, num_computed, num_tokens, 0, ids, gathers)
    if gathers:
        layer.cache.attend(query, task, task.first_read_token)
    state.record(num_tokens, task.scores)
    layer.perform(task, query, query)
    (told,) = report("r", state).layers
    return told


@pytest.mark.parametrize("policy", ["avl", "random"])
def test_the_same_tokens_are_stored_and_core(policy):
    packed, listed = start("pack", policy), start("gather", policy)
    assert listed[0].lists_core
    assert not packed[0].lists_core
    before = run(*packed, 0, PROMPT, False)
    assert run(*listed, 0, PROMPT, False) == before
    for num_tokens in (PROMPT + 2, PROMPT + 4):
        after = run(*packed, num_tokens - 1, num_tokens, False)
        assert run(*listed, num_tokens - 1, num_tokens, True) == after
        assert after.core != before.core
        before = after


def test_the_list_lies_at_the_first_stored_rows_and_names_slots_of_core():
    state, layer, blocks = start("gather")
    told = run(state, layer, blocks, 0, PROMPT, False)
    plan, rows = state.plan, state.layers[1]
    first = plan.private_from * BLOCK_SIZE
    size = plan.num_core_blocks * BLOCK_SIZE
    slots = torch.arange(first, first + size)
    cache_rows = blocks[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE
    entries = [layer.cache.lists[row] for row in cache_rows.tolist()]
    assert len(layer.cache.lists) == len(set(entries)) == size
    read = {rows.positions[0, slot - first].item() for slot in entries}
    text = {p for p in range(plan.num_full_tokens) if p in told.text[0]}
    assert read == set(told.core[0]) | text
    assert max(entries) < plan.num_full_tokens


def test_a_refresh_moves_no_row():
    state, layer, blocks = start("gather")
    run(state, layer, blocks, 0, PROMPT, False)
    keys, values = layer.cache.keys.clone(), layer.cache.values.clone()
    run(state, layer, blocks, PROMPT + 1, PROMPT + 2, True)
    assert torch.equal(layer.cache.keys, keys)
    assert torch.equal(layer.cache.values, values)
