"""Adaptive attention in CUDA graphs: a replay reads what this step reads."""

import pytest

from standin.asks import (
    BACKEND,
    FLASH,
    ON_FLASH,
    SPEC,
    TORCH,
    answer_on_cpu,
    check,
    spec,
)
from standin.process import GRAPHS, generate


@pytest.fixture(scope="module")
def expected(model):
    return answer_on_cpu(model)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("runner", "lists"), [("v1", "one"), ("v2", "many"), ("v2", "none")]
)
def test_graphs_answer_as_the_cpu_does(model, answer, expected, runner, lists):
    options = ("--runner", runner, *BACKEND)
    # All prompts in one step: behind it, every second one chooses core anew.
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    report = answer(model, spec(lists, **settings), *options, **TORCH)
    check(report, expected)
    assert report["graphs"]["replayed"] >= 4


CORE_ALONE = [0, 2, 6, 7]
"""Requests of `SPEC` that need no policy's tensors; of one, every second step
refreshes."""


@pytest.mark.timeout(1200)
def test_a_refresh_is_part_of_the_graph(model, expected):
    """Every step of the answers is a replay: none of them needs Python."""
    requests = [SPEC["requests"][index] for index in CORE_ALONE]
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    asked = spec("one", **settings) | {"requests": requests}
    report = generate(model, asked, "--runner", "v2", *BACKEND)
    answers = {
        name: [expected[name][index] for index in CORE_ALONE]
        for name in ("tokens", "logprobs")
    }
    check(report, answers)
    num_steps = max(map(len, report["tokens"])) - 1
    assert report["graphs"]["replayed"] == num_steps


@pytest.mark.timeout(1200)
def test_flash_attention_in_graphs_answers_as_the_cpu_does(model, expected):
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    options = ("--runner", "v2", *BACKEND)
    report = generate(model, spec("none", **settings), *options, **FLASH)
    check(report, expected, ON_FLASH)
    assert report["graphs"]["replayed"] >= 4
