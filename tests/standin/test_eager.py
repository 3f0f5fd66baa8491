"""Adaptive attention on vLLM's CUDA code path gives what the CPU back end gives."""

import pytest

from standin.asks import (
    AS_STOCK,
    BACKEND,
    FLASH,
    ON_FLASH,
    SPEC,
    TORCH,
    answer_on_cpu,
    check,
    spec,
)
from standin.process import generate


@pytest.fixture(scope="module")
def expected(model):
    return answer_on_cpu(model)


# KV connectors want a cache by heads, then by tokens; else it is the other way about.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("runner", "lists", "layout"), [("v1", "none", "LBHNC"), ("v2", "one", "LBNHC")]
)
def test_both_runners_answer_as_the_cpu_does(model, expected, runner, lists, layout):
    options = ("--runner", runner, "--alone", *BACKEND)
    env = TORCH | {"VLLM_KV_CACHE_LAYOUT": layout}
    report = generate(model, spec(lists), *options, **env)
    check(report, expected)
    assert report["ran"]["layout"] == layout
    # In company and on one's own, cold and over one's own or another's prefix.
    assert report["alone"] == report["tokens"]


@pytest.mark.timeout(1200)
def test_flash_attention_answers_as_the_cpu_does(model, expected):
    options = ("--runner", "v1", "--alone", *BACKEND)
    report = generate(model, spec("none", "flash"), *options, **FLASH)
    check(report, expected, ON_FLASH)
    assert report["alone"] == report["tokens"]


@pytest.mark.timeout(600)
def test_what_is_not_adapted_is_answered_as_by_stock(model, expected):
    requests = [SPEC["requests"][index] for index in AS_STOCK]
    stock = generate(model, {"requests": requests}, "--cpu", "--backend", "CPU_ATTN")
    assert stock["tokens"] == [expected["tokens"][index] for index in AS_STOCK]
