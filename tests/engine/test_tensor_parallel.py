"""Tensor parallel 2: two CPU processes keep the rows that one keeps."""

import os
from pathlib import Path

import pytest

from vllm_avl.testing.engine import Ask, Engine

ASKS = [
    Ask((1,), "What is it?", 20),
    Ask((2, 3), "Compare the two.", 20),
    Ask((), "No picture.", 8),
]
WHOLE = [Ask(a.images, a.text, a.max_tokens, (("avl_store_ratio", 1),)) for a in ASKS]


@pytest.fixture
def start(checkpoints, monkeypatch):
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([tests, os.getenv("PYTHONPATH", "")])
    )
    running = []

    def engine(size, avl):
        if size > 1:
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        extension = {} if avl is None else {"worker_extension_cls": "recorder.Recorder"}
        running.append(
            Engine(
                checkpoints("llava"), avl=avl, tensor_parallel_size=size, **extension
            )
        )
        return running[-1]

    yield engine
    for engine in running:
        engine.shutdown()


@pytest.mark.timeout(900)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_ranks_keep_what_one_keeps(start):
    settings = {"vision_store_ratio": 0.3}
    one = start(1, settings)
    expected, whole = one.ask(ASKS), one.ask(WHOLE)
    (evictions,) = one.llm.collective_rpc("take_evictions")
    assert len(evictions) == 2 * 4
    one.shutdown()

    two = start(2, settings)
    assert two.ask(ASKS) == expected
    assert two.ask(ASKS) == expected
    first, second = two.llm.collective_rpc("take_evictions")
    assert first == second
    assert first[: len(evictions)] == evictions
    assert two.ask(WHOLE) == whole
    two.shutdown()

    stock = start(2, None)
    assert stock.ask(ASKS) == whole
