"""Steps over requests made by hand, as a worker would be told of them."""

import torch

from vllm_avl.config import AVLConfig
from vllm_avl.plan import Compaction, make_plan
from vllm_avl.worker.request import Kernels
from vllm_avl.worker.step import WorkerRequests
from vllm_avl.worker.view import make_tasks, stored_table, stored_table_on_cpu

BLOCK_SIZE = 32
PROMPT = 600
"""5 text, 576 vision, 19 text: 18 full blocks of 32 and 24 rows."""
NUM_FULL = 18
START = 8
"""Blocks in front of the stored ones, where half of the vision tokens is stored."""
CORE = {"core_ratio": 0.2, "refresh_interval": 3}
TEXT = {"text_keep_ratio": 0.5}
CPU_KERNELS = Kernels(attend_scored=True)
CUDA_KERNELS = Kernels(choose_core=True, num_lists=1)


def plan_of(num_prompt=PROMPT, ranges=((5, 581),), **settings):
    return make_plan(num_prompt, ranges, BLOCK_SIZE, AVLConfig(**settings))


def compaction_of(plan, first_private):
    """Private blocks in no order."""
    order = torch.randperm(plan.num_stored_blocks) + first_private
    return Compaction(plan, (*order.tolist(),), in_place=False, num_copied=0)


class Worker:
    """Requests on a worker, and the runner's block table."""

    def __init__(self, kernels=CPU_KERNELS, per_block=1, **options):
        self.per_block = per_block
        self.block_size = BLOCK_SIZE // per_block
        self.requests = WorkerRequests(
            kernels=kernels, block_size=BLOCK_SIZE, **options
        )
        self.num_given = 0

    def give(self, name, plan=None, **settings):
        """Tell of a request whose prompt ends; return where its kept rows go."""
        plan = plan or plan_of(**settings)
        told = compaction_of(plan, 10_000 + 100 * self.num_given)
        self.num_given += 1
        self.requests.update((), (), {name: told})
        return self.expanded(told.block_ids)

    def expanded(self, block_ids):
        """Blocks as the kernel counts them."""
        n = self.per_block
        return [n * block + part for block in block_ids for part in range(n)]

    def begin(self, *spans):
        """Open a step of `(name, tokens before, new tokens)`."""
        return self.requests.begin(
            {name: old for name, old, _ in spans},
            {name: new for name, _, new in spans},
            lambda: [name for name, *_ in spans],
        )

    def take(self, *spans, num_padded=0):
        """Take one step, as far as requests are concerned."""
        step = self.begin(*spans)
        seen = View(self, step, spans, num_padded)
        step.end()
        return seen


class View:
    """What a step reads and does."""

    def __init__(self, worker, step, spans, num_padded=0):
        self.block_size = worker.block_size
        self.step, self.rows = step, step.rows()
        num_rows, width = len(spans) + num_padded, 64 * worker.per_block
        ids = torch.arange(1, 1 + width * num_rows, dtype=torch.int32)
        self.table = ids.flip(0).view(num_rows, width).clone()
        untouched = self.table.clone()
        self.stored = stored_table(self.rows, self.table, worker.block_size)
        assert self.stored.dtype == torch.int32
        of_rows = self.table[: len(spans)]
        sizes = worker.block_size, width
        on_cpu = stored_table_on_cpu(self.rows, of_rows, *sizes)
        assert on_cpu.dtype == torch.int32
        assert torch.equal(on_cpu, self.stored[: len(spans)])
        self.starts = [0]
        for _, _, new in spans:
            self.starts.append(self.starts[-1] + new)
        self.tasks = make_tasks(
            self.rows, self.table, self.stored, self.starts, worker.block_size
        )
        assert torch.equal(self.table, untouched)
        self.lengths = [old + new for _, old, new in spans]

    def read(self, row=0):
        """Block ids that the attention reads of a row, and how many keys."""
        in_front = int(self.rows.first_block[row]) * BLOCK_SIZE
        num_keys = self.lengths[row] - in_front
        num_blocks = -(-num_keys // self.block_size)
        return self.stored[row, :num_blocks].tolist(), num_keys

    def own(self, first, end, row=0):
        """Some of the runner's block ids of a row."""
        return self.table[row, first:end].tolist()
