"""Adaptive attention in CUDA graphs: a replay reads what this step reads."""

import pytest

from standin.asks import BACKEND, FLASH, ON_FLASH, answer_on_cpu, check, spec
from standin.process import GRAPHS, generate


@pytest.fixture(scope="module")
def expected(model):
    return answer_on_cpu(model)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("runner", "executor"), [("v1", "gather"), ("v2", "gather"), ("v2", "pack")]
)
def test_graphs_answer_as_the_cpu_does(model, expected, runner, executor):
    options = ("--runner", runner, *BACKEND)
    # All prompts in one step: behind it, every second one chooses core anew.
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    report = generate(model, spec(executor, **settings), *options)
    check(report, expected)
    assert report["graphs"]["replayed"] >= 4


@pytest.mark.timeout(1200)
def test_flash_attention_in_graphs_answers_as_the_cpu_does(model, expected):
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    options = ("--runner", "v2", *BACKEND)
    report = generate(model, spec("pack", **settings), *options, **FLASH)
    check(report, expected, ON_FLASH)
    assert report["graphs"]["replayed"] >= 4
