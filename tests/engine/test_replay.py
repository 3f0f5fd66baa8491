"""A preempted request replays: one prefill over what is stored, then a refresh."""

import pytest
from following import ask, compare, watch
from oracle import Oracle

NUM_REPLAYED = 20
SETTINGS = {
    "core": {"core_ratio": 0.2},
    "core-and-text": {"core_ratio": 0.2, "text_keep_ratio": 0.3},
    "h2o": {"core_ratio": 0.2, "policy": "h2o"},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_replay(engines, checkpoints, settings):
    engine = engines(avl={"introspection": 4}, kv_cache_memory_bytes=256 << 20)
    one = ask("two", **SETTINGS[settings])
    preempted = []

    def preempt(answers):
        if NUM_REPLAYED - 1 in answers[0].reports and not preempted:
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            preempted.append(engine.scheduler.waiting.peek_request())

    (answer,) = watch(engine, [one], settings, preempt)
    (request,) = preempted
    assert request.num_preemptions == 1
    oracle = Oracle(checkpoints("llava"))
    assert compare(engine, oracle, one, answer, NUM_REPLAYED) <= 5
