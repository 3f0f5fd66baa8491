"""KV events say what is in the prefix cache, whatever becomes of prompts' blocks."""

import random
from collections import Counter

import pytest
from hand_driven import asked, make_scheduler, outputs_of
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from vllm_avl.scheduler.scheduler import AVLScheduler


def cached(scheduler):
    """How many blocks of each hash a request could hit."""
    return Counter(
        maybe_convert_block_hash(get_block_hash(block.block_hash))
        for block in scheduler.kv_cache_manager.block_pool.blocks
        if block.block_hash is not None
    )


@pytest.mark.parametrize("num_blocks", [50, 70, 200])
def test_events_add_up_to_what_is_cached(engines, num_blocks):
    rng = random.Random(num_blocks)
    core = engines().core
    config = core.vllm_config.kv_events_config
    core.vllm_config.kv_events_config = KVEventsConfig(
        enable_kv_cache_events=True, publisher="null"
    )
    try:
        scheduler = make_scheduler(AVLScheduler, core, num_blocks, {"store_ratio": 0.5})
    finally:
        core.vllm_config.kv_events_config = config
    told, kinds, num_added = Counter(), set(), 0
    taken, take = [], scheduler.kv_cache_manager.take_events

    def take_and_keep():
        events = take()
        taken.extend(events)
        return events

    scheduler.kv_cache_manager.take_events = take_and_keep
    while num_added < 30 or scheduler.has_unfinished_requests():
        if num_added < 30 and rng.random() < 0.4:
            pictures = [(rng.randrange(3), 576, rng.choice((40, 90)))]
            xargs = rng.choice(({}, {"avl": 0}, {"avl_store_ratio": 0.2}))
            request = asked(f"{num_added}", 8, pictures, rng.randint(2, 40), **xargs)
            scheduler.add_request(request)
            num_added += 1
        output = scheduler.schedule()
        result = outputs_of(output)
        scheduler.update_from_output(output, result)
        take_and_keep()
        for event in taken:
            kinds.add(type(event))
            if isinstance(event, BlockStored):
                told.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                told.subtract(event.block_hashes)
            else:
                assert isinstance(event, AllBlocksCleared)
                told.clear()
        taken.clear()
        assert +told == cached(scheduler)
    assert BlockStored in kinds
    assert BlockRemoved in kinds or num_blocks > 100
