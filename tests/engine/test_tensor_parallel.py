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
ALL = (("avl_store_ratio", 1), ("avl_core_ratio", 1))
WHOLE = [Ask(a.images, a.text, a.max_tokens, ALL) for a in ASKS]


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
def test_two_ranks_keep_and_read_what_one_does(start):
    settings = {
        "vision_store_ratio": 0.3,
        "vision_core_ratio": 0.1,
        "refresh_all_ranks": True,
    }
    one = start(1, settings)
    expected, whole = one.ask(ASKS), one.ask(WHOLE)
    (moves,) = one.llm.collective_rpc("take_moves")
    # Two adaptive requests, four layers: the prompt, and a refresh at 3, 6, ... 18.
    assert len(moves) == 2 * 4 * 7
    one.shutdown()

    two = start(2, settings)
    assert two.ask(ASKS) == expected
    assert two.ask(ASKS) == expected
    first, second = two.llm.collective_rpc("take_moves")
    assert first == second
    assert prompts_of(first)[:8] == prompts_of(moves)
    assert two.ask(WHOLE) == whole
    two.shutdown()

    stock = start(2, None)
    assert stock.ask(ASKS) == whole


def prompts_of(moves):
    """What was moved at the end of prompts: scores far enough from ties to compare."""
    return [move for move in moves if move[0]]
