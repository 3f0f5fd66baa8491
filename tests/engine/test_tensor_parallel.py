"""Tensor parallel 2: two CPU processes keep the rows that one keeps."""

import os
from operator import itemgetter

import pytest

from benchmarks.testing.engine import Ask, Engine

ASKS = [
    Ask((1,), "What is it?", 20),
    Ask((2, 3), "Compare the two.", 20),
    Ask((), "No picture.", 8),
]
ALL = (("avl_store_ratio", 1), ("avl_core_ratio", 1))
WHOLE = [Ask(a.images, a.text, a.max_tokens, ALL) for a in ASKS]


@pytest.fixture
def start(checkpoints, monkeypatch):
    running = []

    def engine(size, avl):
        if size > 1:
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        running.append(Engine(checkpoints("llava"), avl=avl, tensor_parallel_size=size))
        return running[-1]

    yield engine
    for engine in running:
        engine.shutdown()


@pytest.mark.timeout(1800)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_ranks_keep_and_read_what_one_does(start):
    settings = {
        "store_ratio": 0.3,
        "core_ratio": 0.1,
        "refresh_all_ranks": True,
        "introspection": 16,
    }
    one = start(1, settings)
    expected, whole = one.ask(ASKS), one.ask(WHOLE)
    ((stored, selections),) = remembered(one)
    # Two adaptive requests, four layers: the prompt, and a refresh at 3, 6, ... 18.
    assert len(stored) == 2 * 4
    assert all(len(history) == 7 for history in selections)
    one.shutdown()

    two = start(2, settings)
    assert two.ask(ASKS) == expected
    first, second = remembered(two)
    assert first == second
    # Of refreshes, scores may be too close to ties to compare.
    assert first[0] == stored
    assert [history[0] for history in first[1]] == [h[0] for h in selections]
    assert two.ask(ASKS) == expected
    assert two.ask(WHOLE) == whole
    two.shutdown()

    stock = start(2, None)
    assert stock.ask(ASKS) == whole


def remembered(engine):
    """What each rank stored, and what it read after each selection, by layer."""
    for reports in zip(*engine.reports(), strict=True):
        # Those that end in one step are remembered in any order.
        in_order = sorted(reports, key=itemgetter("num_prompt_tokens"))
        layers = [layer for report in in_order for layer in report["layers"]]
        yield (
            [
                [{*core, *secondary} for core, secondary in zip(*parts, strict=True)]
                for layer in layers
                for parts in [(layer["core"], layer["secondary"])]
            ],
            [[each["core"] for each in layer["history"]] for layer in layers],
        )
