"""Asynchronous scheduling, driven by hand: the CPU build never turns it on.

A fake worker applies the same view of a step as the real one, one step behind the
scheduler, and checks that every block a step reads is still its request's when it runs.
"""

import random

import pytest
import torch
from hand_driven import BLOCK_SIZE, make_scheduler, request, settle
from vllm.v1.request import RequestStatus

from benchmarks.testing.engine import check_integrity
from vllm_avl import plan as plans
from vllm_avl.messages import received_compactions
from vllm_avl.scheduler.scheduler import AVLAsyncScheduler
from vllm_avl.worker.step import WorkerRequests
from vllm_avl.worker.view import make_tasks, stored_table

NUM_BLOCKS = 100

SETTINGS = {
    "store": {"store_ratio": 0.3},
    "store-core-text": {
        "store_ratio": 0.3,
        "core_ratio": 0.1,
        "text_keep_ratio": 0.3,
    },
}


@pytest.fixture(params=SETTINGS)
def scheduler(request, engines, monkeypatch):
    monkeypatch.setattr(plans, "TEXT_MIN_TOKENS", 8)
    return make_scheduler(
        AVLAsyncScheduler,
        engines().core,
        NUM_BLOCKS,
        SETTINGS[request.param],
        async_scheduling=True,
        max_num_batched_tokens=300,
    )


class FakeWorker:
    """What a worker knows of the requests, from scheduler outputs alone."""

    def __init__(self):
        self.requests = WorkerRequests(block_size=BLOCK_SIZE)
        self.tables = {}
        self.num_compacted = self.num_in_place = 0

    def execute(self, output, held):
        """Take one step; `held` maps request ids to the blocks they hold now."""
        self.requests.update(
            output.finished_req_ids,
            output.preempted_req_ids or (),
            received_compactions(output),
        )
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(new.block_ids[0]), new.num_computed_tokens]
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids,
            cached.new_block_ids,
            cached.num_computed_tokens,
            strict=True,
        ):
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = [list(blocks[0]), computed]
            else:
                self.tables[request_id][0] += blocks[0] if blocks else []
                self.tables[request_id][1] = computed
        scheduled = output.num_scheduled_tokens
        computed = {name: self.tables[name][1] for name in scheduled}
        for name, num_new in scheduled.items():
            self.read(name, computed[name], num_new, held.get(name))
        step = self.requests.begin(computed, scheduled, list)
        if step is not None:
            step.end()

    def read(self, request_id, computed, num_new, held):
        """Look at what a request reads and writes in its step."""
        table = torch.tensor([self.tables[request_id][0]], dtype=torch.int32)
        end, start = computed + num_new, 0
        step = self.requests.begin(
            {request_id: computed}, {request_id: num_new}, lambda: [request_id]
        )
        touched = set()
        if step is not None:
            rows = step.rows()
            start = int(rows.first_block[0]) * BLOCK_SIZE
            stored = stored_table(rows, table, BLOCK_SIZE)
            tasks = make_tasks(rows, table, stored, [0, num_new], BLOCK_SIZE)
            table = stored
            for task in tasks:
                touched |= set(task.stored.tolist())
                self.num_compacted += task.prompt is not None
                self.num_in_place += task.state.compaction.in_place
        read = set(table[0, : -(-(end - start) // BLOCK_SIZE)].tolist())
        # None: finished, aborted or preempted while the step was in flight.
        if held is not None:
            assert read <= held, f"{request_id} reads blocks it does not hold"
            assert touched <= held, f"{request_id} writes others' blocks"


def held_blocks(scheduler):
    manager = scheduler._avl_manager
    held = {
        request_id: {block.block_id for block in blocks if not block.is_null}
        for request_id, blocks in manager.req_to_blocks.items()
    }
    for request_id, known in manager.adapted.items():
        private = {block.block_id for block in known.private}
        held[request_id] = held.get(request_id, set()) | private
    return held


@pytest.mark.parametrize("seed", range(20))
def test_one_step_ahead(scheduler, seed):
    rng = random.Random(seed)
    worker, in_flight, step, added = FakeWorker(), [], 0, 0
    while step < 30 or scheduler.has_unfinished_requests() or in_flight:
        assert step < 3000
        if step < 30 and rng.random() < 0.4:
            scheduler.add_request(
                request(f"{added}", rng.randint(0, 2), rng.choice([1, 5, 60, 150]))
            )
            added += 1
        if rng.random() < 0.03 and scheduler.running:
            victim = rng.choice(scheduler.running).request_id
            scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        output = scheduler.schedule()
        output.avl_partial = {
            request_id
            for request_id in output.num_scheduled_tokens
            if scheduler.requests[request_id].is_prefill_chunk
        }
        check_integrity(scheduler)
        in_flight.append(output)
        # The step before this one runs only now that this one is scheduled.
        ahead = 1 if output.num_scheduled_tokens else 0
        while len(in_flight) > ahead:
            executed = in_flight.pop(0)
            worker.execute(executed, held_blocks(scheduler))
            settle(scheduler, executed)
            check_integrity(scheduler)
        step += 1
    assert worker.num_compacted > 0
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert not scheduler._avl_manager.adapted
