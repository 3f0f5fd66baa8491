"""One request in one layer, through all that a step goes through on either device.

Rows are known by position, so that what a step reads can be told from an oracle that
has never heard of blocks. What was the prompt's and is nobody's now holds NaN.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from vllm_avl.kernels.cpu import reference
from vllm_avl.kernels.cuda import ranking
from vllm_avl.kernels.cuda.copy_rows import copy_rows
from vllm_avl.kernels.cuda.rank_rows import rank_rows
from vllm_avl.kernels.cuda.select_core import select_core
from vllm_avl.kernels.cuda.selected_attention import selected_attention
from vllm_avl.kernels.cuda.vision_scores import vision_scores

from vllm_avl.config import AVLConfig
from vllm_avl.plan import Compaction, make_plan
from vllm_avl.worker.cpu.backend import _attended
from vllm_avl.worker.cpu.cache import CPUCache
from vllm_avl.worker.cuda.cache import CUDACache
from vllm_avl.worker.cuda.core_lists import CoreLists
from vllm_avl.worker.cuda.listed_rows import some_rows, whole_step
from vllm_avl.worker.introspection import report
from vllm_avl.worker.layer import Layer
from vllm_avl.worker.ranks import Ranks
from vllm_avl.worker.request import Kernels
from vllm_avl.worker.step import WorkerRequests
from vllm_avl.worker.view import make_tasks, stored_table

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 4, 2, 16
SCALE = 1.0
"""Attention far from uniform, so that rounding does not decide who is better."""
PROMPT, VISION = 205, ((5, 81), (96, 180))
"""6 full blocks, of 160 vision and 32 text tokens, and 13 rows."""
NUM_FULL = PROMPT // BLOCK_SIZE
MAX_TOKENS, NUM_BLOCKS = 300, 40
OPERATIONS = copy_rows, rank_rows, select_core, selected_attention, vision_scores
MODULES = ranking, *(sys.modules[operation.__module__] for operation in OPERATIONS)
ALONE = Ranks(lambda scores: scores, lambda scores, dim: scores)


def two_ranks():
    """Ranks whose heads see the same."""
    return Ranks(
        lambda scores: 2 * scores, lambda scores, dim: torch.cat([scores] * 2, dim)
    )


def slots_of(blocks, count):
    """Cache blocks and rows of them of a request's first slots."""
    slots = torch.arange(count)
    return blocks[slots // BLOCK_SIZE].long(), slots % BLOCK_SIZE


class OnCPU:
    """A layer's cache as vLLM's CPU kernel lays it out, and who attends."""

    kernels = Kernels(attend_scored=True)

    def __init__(self, num_lists):
        shape = NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        self.kv_cache = torch.full(shape, torch.nan)
        self.cache = self.new_cache()

    def new_cache(self):
        return CPUCache(self.kv_cache, HEAD_SIZE, SCALE, 0.0)

    def halves(self):
        """Keys and values [num_blocks, num_kv_heads, block_size, head_size]."""
        return reference.split(self.cache.halves, HEAD_SIZE)

    def attend(self, rows, stored, seq_lens, query, output):
        # As the back end does: a new one in every step.
        self.cache = self.new_cache()
        starts = torch.tensor([0, len(query)], dtype=torch.int32)
        ours = _attended(rows, stored, seq_lens.numpy(), starts)
        if ours is not None:
            self.cache.attend(query, ours.rows, ours.masks("l.1"), output)
        return ours is not None


class OnTriton:
    """A layer's cache as vLLM's CUDA back ends lay it out, and who attends."""

    def __init__(self, num_lists):
        self.kernels = Kernels(choose_core=True, num_lists=num_lists)
        shape = NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        self.kv_cache = torch.full(shape, torch.nan)
        self.num_entered = torch.zeros(1, dtype=torch.int32)
        self.in_graph = self.new_lists(num_lists)
        self.beside = self.new_lists(2)
        self.cache = CUDACache(
            self.kv_cache, HEAD_SIZE, SCALE, 0.0, "layer", self.lists_of
        )

    def new_lists(self, num_lists):
        return CoreLists(
            NUM_BLOCKS * BLOCK_SIZE,
            NUM_HEADS,
            NUM_KV_HEADS,
            1 if num_lists == 1 else NUM_KV_HEADS,
            4,
            self.num_entered,
            ["layer"],
        )

    def lists_of(self, state):
        records = state.seats.records
        return self.in_graph if records["in_graph"][state.seat] else self.beside

    def halves(self):
        return self.cache.keys, self.cache.values

    def attend(self, rows, stored, seq_lens, query, output):
        starts = torch.tensor([0, len(query)], dtype=torch.int32)
        common = SimpleNamespace(
            num_reqs=1,
            block_table_tensor=stored,
            seq_lens=seq_lens,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
        )
        in_graph = rows.is_attended & rows.of["in_graph"]
        if rows.in_pass.any():
            rows.step.num_entered = self.num_entered
        listed = []
        if len(query) == 1:
            listed.append(whole_step(self.in_graph, common, rows, in_graph, 1))
        if (rows.is_attended & ~in_graph).any():
            found = rows.is_attended & ~in_graph
            listed.append(some_rows(self.beside, common, rows, found, 1))
        for one in listed:
            one.attend(self.cache, query, output)
        return bool(listed)


class Served:
    """One request, from the step that ends its prompt on."""

    def __init__(
        self,
        device,
        targets=None,
        ranks=ALONE,
        num_lists=1,
        *,
        shares=False,
        **settings,
    ):
        """Compute all of the prompt but its last chunk.

        Args:
            device: `OnCPU` or `OnTriton`.
            targets: indices of the prompt's blocks that kept rows go to, None among
                them for private ones; all private by default.
            ranks: the tensor-parallel group.
            num_lists: that graphs read.
            shares: whether kept rows stay in the prompt's blocks.
            settings: of the request.
        """
        plan = make_plan(PROMPT, VISION, BLOCK_SIZE, AVLConfig(**settings))
        if shares:
            plan, targets = replace(plan, shares=True), range(NUM_FULL)
        torch.manual_seed(0)
        shape = MAX_TOKENS, NUM_KV_HEADS, HEAD_SIZE
        self.keys, self.values = torch.randn(shape), torch.randn(shape)
        ids = torch.randperm(NUM_BLOCKS - 1, dtype=torch.int32) + 1
        self.table, spare = ids[: MAX_TOKENS // BLOCK_SIZE + 1], ids[20:].tolist()
        own = self.table.tolist()
        wanted = [*targets] if targets else [None] * plan.num_stored_blocks
        stored = [spare.pop() if index is None else own[index] for index in wanted]
        assert len(stored) == plan.num_full_blocks - plan.first_stored_block
        num_private = wanted.count(None)
        in_place = plan.moves_rows and num_private < len(wanted)
        num_copied = 0 if plan.moves_rows else num_private
        self.told = Compaction(plan, tuple(stored), in_place, num_copied)
        self.device = device(num_lists)
        self.requests = WorkerRequests(
            kernels=self.device.kernels, block_size=BLOCK_SIZE
        )
        self.ranks, self.length = ranks, 0
        self.append(0, PROMPT)

    @property
    def state(self):
        return self.requests.running["r"]

    @property
    def rows(self):
        """What the layer knows of its rows."""
        return self.state.layers["l.1"]

    @property
    def plan(self):
        return self.told.plan

    def append(self, first, end):
        """Let the runner write rows where its table says."""
        blocks, slots = slots_of(self.table, end)
        for half, rows in zip(
            self.device.halves(), (self.keys, self.values), strict=True
        ):
            half[blocks[first:], :, slots[first:]] = rows[first:end]

    def end_prompt(self, num_new=PROMPT):
        """Compute the prompt's last chunk, and what becomes of the prompt."""
        self.requests.update((), (), {"r": self.told})
        self.length = PROMPT - num_new
        output = self.step(num_new)
        # Whoever gets these blocks now writes what he likes.
        given_back = set(self.table[:NUM_FULL].tolist()) - set(self.told.block_ids)
        self.poison(list(given_back))
        return output

    def poison(self, blocks):
        """Let somebody else have blocks."""
        for half in self.device.halves():
            half[blocks] = torch.nan

    def step(self, num_new=1):
        """Take a step; return the attention of the last row."""
        before, self.length = self.length, self.length + num_new
        torch.manual_seed(self.length)
        query = torch.randn(num_new, NUM_HEADS, HEAD_SIZE)
        self.append(before, self.length)
        step = self.requests.begin({"r": before}, {"r": num_new}, lambda: ["r"])
        rows, table = step.rows(), self.table.unsqueeze(0)
        stored = stored_table(rows, table, BLOCK_SIZE)
        in_front = int(rows.first_block[0]) * BLOCK_SIZE
        seq_lens = torch.tensor([self.length - in_front], dtype=torch.int32)
        output = torch.full_like(query, torch.nan)
        ours = self.device.attend(rows, stored, seq_lens, query, output)
        if not ours:
            output[-1] = self.attend_all(stored[0], int(seq_lens[0]), query[-1])
        expected = self.expected(query[-1], before, bool(step.reads_all[0]))
        torch.testing.assert_close(output[-1], expected, atol=2e-5, rtol=1e-5)
        self.tasks = make_tasks(rows, table, stored, [0, num_new], BLOCK_SIZE)
        for task in self.tasks:
            Layer("l.1", self.device.cache, self.ranks).perform(task, query, output)
            num_freed = 0 if self.plan.shares else task.num_aged // BLOCK_SIZE
            self.poison(task.stored[:num_freed].tolist())
        step.end()
        return output[-1]

    def attend_all(self, blocks, num_keys, query):
        """What vLLM's own kernel does with a row."""
        blocks, slots = slots_of(blocks, num_keys)
        return attention(
            query, *(half[blocks, :, slots] for half in self.device.halves())
        )

    def expected(self, query, before, reads_all):
        """The oracle of a step's last row, by positions."""
        output = torch.empty_like(query)
        for head in range(NUM_KV_HEADS):
            group = slice(2 * head, 2 * head + 2)
            read = torch.arange(self.length)
            if before >= PROMPT:
                read = self.positions(head, core=not reads_all)
            rows = (known[read, head : head + 1] for known in (self.keys, self.values))
            output[group] = attention(query[group], *rows)
        return output

    def positions(self, head, core):
        """[num_rows] which a KV head stores, or reads in ordinary steps, ascending."""
        rows = self.rows
        ranking = min(head, len(rows.positions) - 1)
        known, mask = rows.positions[ranking], rows.mask() if core else rows.stays()
        if mask is not None:
            known = known[mask[ranking]]
        appended = torch.arange(rows.start + rows.num_slots, self.length)
        return torch.cat([known, appended]).sort().values

    def stored_blocks(self):
        """Blocks of what is stored, in the order of slots."""
        gone = self.state.plan.num_freed_blocks(self.length)
        gone -= self.plan.first_stored_block
        ids = [*self.told.block_ids, *self.table[NUM_FULL:].tolist()]
        return torch.tensor(ids[gone:], dtype=torch.int32)

    def check_rows(self):
        """Assert that every slot holds the row it is said to hold, bit by bit."""
        rows = self.rows
        blocks, slots = slots_of(self.stored_blocks(), rows.num_slots)
        positions = rows.positions.expand(NUM_KV_HEADS, -1)
        for half, known in zip(
            self.device.halves(), (self.keys, self.values), strict=True
        ):
            held = half[blocks, :, slots]
            for head in range(NUM_KV_HEADS):
                assert torch.equal(held[:, head], known[positions[head], head])

    def cores(self):
        """Core of each ranking, positions ascending."""
        return [
            self.positions(head, core=True).tolist()
            for head in range(len(self.rows.positions))
        ]

    def report(self):
        (layer,) = report("r", self.state).layers
        return layer


def attention(query, keys, values):
    """[num_heads, head_size] of one row over [num_rows, num_kv_heads, head_size]."""
    group = len(query) // keys.shape[1]
    keys, values = (rows.repeat_interleave(group, 1) for rows in (keys, values))
    logits = torch.einsum("hd,nhd->hn", query, keys) * SCALE
    return torch.einsum("hn,nhd->hd", logits.softmax(1), values)


def probabilities(query, keys):
    """[num_heads, num_keys] of one row."""
    keys = keys.repeat_interleave(len(query) // keys.shape[1], 1)
    return (torch.einsum("hd,nhd->hn", query, keys) * SCALE).softmax(1)
