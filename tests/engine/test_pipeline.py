"""Pipeline parallel 2: two CPU processes with half of the layers say what one says."""

import os

import pytest
from prometheus_client import REGISTRY

from benchmarks.testing.engine import Ask, Engine, check_integrity
from vllm_avl.metrics.definitions import PREFIX

ASKS = [
    Ask((1,), "What is it?", 20),
    Ask((2, 3), "Compare the two.", 20),
    Ask((), "No picture.", 8),
    # A second question about the same picture.
    Ask((1,), "And now?", 20),
]
ALL = (("avl_store_ratio", 1), ("avl_core_ratio", 1))
WHOLE = [Ask(ask.images, ask.text, ask.max_tokens, ALL) for ask in ASKS]
SETTINGS = {"store_ratio": 0.3, "core_ratio": 0.1, "introspection": 16}
TWO = {"pipeline_parallel_size": 2, "enforce_eager": False}
"""Stock 0.32 makes room for what a stage receives in a warm-up, not if eager."""
COUNTERS = ("refreshes", "core_rows_selected", "core_rows_entered")


@pytest.fixture
def start(checkpoints, monkeypatch):
    running = []

    def engine(avl, **options):
        if options:
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
            # It would leave the warm-up out.
            monkeypatch.setenv("VLLM_CPU_CI_ENV", "0")
        options |= {"max_model_len": 2048, "disable_log_stats": False}
        running.append(Engine(checkpoints("llava"), avl=avl, **options))
        return running[-1]

    yield engine
    for engine in running:
        engine.shutdown()


def metric(engine, name):
    config = engine.llm.llm_engine.vllm_config
    labels = {"model_name": config.model_config.served_model_name, "engine": "0"}
    return REGISTRY.get_sample_value(f"{PREFIX}{name}_total", labels)


def counted(engine, asks):
    """Answer `asks` in one batch; return the tokens, and what counters grew by."""
    before = [metric(engine, name) for name in COUNTERS]
    tokens = engine.ask(asks)
    return tokens, [
        metric(engine, name) - number
        for name, number in zip(COUNTERS, before, strict=True)
    ]


def evicted(engine):
    """Of each request: what a layer, of any stage, does not store."""
    # Those that end in one step are remembered in any order.
    by_request = sorted(engine.reports(), key=lambda reports: reports[0]["request_id"])
    return [
        {
            layer["layer"]: layer["evicted"]
            for report in reports
            for layer in report["layers"]
        }
        for reports in by_request
    ]


@pytest.mark.timeout(1800)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_stages_say_keep_and_count_what_one_does(start):
    one = start(SETTINGS)
    expected, counts = counted(one, ASKS)
    assert min(counts) > 0
    kept = evicted(one)
    assert [len(layers) for layers in kept] == [4, 4, 4]
    whole = one.ask(WHOLE)
    one.shutdown()

    two = start(SETTINGS, **TWO)
    assert counted(two, ASKS) == (expected, counts)
    assert evicted(two) == kept
    assert two.ask(WHOLE) == whole
    # Over what is in the cache, some given up on the way.
    for number, ask in enumerate([*ASKS, *ASKS]):
        two.add(str(number), ask)
    answers = {}
    while two.llm.llm_engine.has_unfinished_requests():
        answers |= two.step()
        check_integrity(two.scheduler)
        if len(answers) == 2:
            two.abort("7")
    assert [answers[str(number)] for number in range(7)] == [*expected, *expected[:3]]
