"""Asynchronous scheduling, driven by hand: the CPU build never turns it on.

A fake worker applies the same view of a step as the real one, one step behind the
scheduler, and checks that every block a step reads is still its request's when it runs.
"""

import copy
import random

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_avl.backend.step import WorkerRequests
from vllm_avl.backend.view import make_view, shift
from vllm_avl.compat.scheduler import AVLAsyncScheduler, received_plans
from vllm_avl.testing.engine import check_integrity

BLOCK_SIZE = 32


SETTINGS = {
    "store": {"vision_store_ratio": 0.3},
    "store-core-text": {
        "vision_store_ratio": 0.3,
        "vision_core_ratio": 0.1,
        "text_keep_ratio": 0.3,
        "text_min_tokens": 8,
    },
}


@pytest.fixture(params=SETTINGS)
def scheduler(request, engines):
    core = engines().core
    config = copy.deepcopy(core.vllm_config)
    config.additional_config = {"avl": SETTINGS[request.param]}
    config.scheduler_config.async_scheduling = True
    config.scheduler_config.max_num_batched_tokens = 300
    kv_cache_config = copy.deepcopy(core.scheduler.kv_cache_config)
    kv_cache_config.num_blocks = 150
    return AVLAsyncScheduler(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=False,
    )


def request(request_id, num_images, max_tokens, text=20):
    init_none_hash(sha256)
    features, tokens = [], [1] * text
    for image in range(num_images):
        features.append(
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=f"image-{image}",
                mm_position=PlaceholderRange(offset=len(tokens), length=576),
                mm_hash=f"image-{image}",
            )
        )
        tokens += [2] * 576 + [3] * text
    return Request(
        request_id,
        tokens,
        SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        None,
        mm_features=features,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


class FakeWorker:
    """What a worker knows of the requests, from scheduler outputs alone."""

    def __init__(self):
        self.requests = WorkerRequests()
        self.tables = {}
        self.num_compacted = 0

    def execute(self, output, held):
        """Take one step; `held` maps request ids to the blocks they hold now."""
        self.requests.update(
            output.finished_req_ids,
            output.preempted_req_ids or (),
            received_plans(output),
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
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            self.read(request_id, num_tokens, held.get(request_id))

    def read(self, request_id, num_tokens, held):
        table, computed = self.tables[request_id]
        span = request_id, computed, computed + num_tokens
        turn = self.requests.turns([span]).get(request_id)
        blocks = torch.tensor([table], dtype=torch.int32)
        view = make_view([turn], blocks, [0], BLOCK_SIZE, fuses_scores=True)
        shifted, lens = shift(
            torch.tensor(view.first_blocks, dtype=torch.int32),
            blocks,
            torch.tensor([computed + num_tokens], dtype=torch.int32),
            BLOCK_SIZE,
        )
        for task in view.tasks:
            stored = task.state.plan.num_freed_blocks(task.num_computed)
            touched = set(task.blocks[stored:].tolist())
            assert held is None or touched <= held, (
                f"{request_id} writes others' blocks"
            )
        self.num_compacted += sum(task.compacts for task in view.tasks)
        read = shifted[0, : -(-int(lens[0]) // BLOCK_SIZE)].tolist()
        # None: finished, aborted or preempted while the step was in flight.
        if held is not None:
            assert set(read) <= held, f"{request_id} reads blocks it does not hold"


def held_blocks(scheduler):
    return {
        request_id: {block.block_id for block in blocks if not block.is_null}
        for request_id, blocks in scheduler._avl_manager.req_to_blocks.items()
    }


def outputs_of(output):
    ids = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
    )


def settle(scheduler, output):
    """Hand a step's result back; chunks of a prompt sample nothing."""
    result = outputs_of(output)
    for i, request_id in enumerate(result.req_ids):
        if request_id in output.avl_partial:
            result.sampled_token_ids[i] = []
    scheduler.update_from_output(output, result)


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
    assert pool.get_num_free_blocks() == 149
    assert not scheduler._avl_manager.plans
