"""Adaptive attention on vLLM's CUDA code path, against the CPU back end.

The CPU back end's tokens are those of an independent oracle (tests/engine); here both
of CUDA's model runners, eager and in graphs, have to give the same.
"""

import pytest

from standin.process import GRAPHS, generate

CORE = {"avl_core_ratio": 0.25, "avl_refresh_interval": 2}
TEXT = {"avl_text_keep_ratio": 0.3}
LONG = "What is it? " * 6


def ask(*images, text="What is it?", max_tokens=8, **xargs):
    return {
        "images": list(images),
        "text": text,
        "max_tokens": max_tokens,
        "xargs": xargs,
    }


SPEC = {
    "requests": [
        ask(1),
        ask(1, avl=0),
        ask(2, 3, **CORE),
        ask(4, text=LONG, max_tokens=12, **CORE, **TEXT),
        ask(5, avl_policy="h2o", **CORE),
        ask(6, avl_policy="snapkv", avl_store_ratio=0.3),
        ask(7, avl_store_ratio=1),
        ask(text="No picture at all."),
    ],
    "llm": {
        "additional_config": {"avl": {"vision_store_ratio": 0.5}},
        "enable_prefix_caching": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
    },
}
AS_STOCK = [1, 6, 7]
"""Requests that must be served as if we were not there."""
BUDGET = 1e-4
"""Log-probabilities of fp32, on two kernels' orders of summation."""
BACKEND = ("--backend", "AVL", "--logprobs")


@pytest.fixture(scope="module")
def expected(model):
    report = generate(model, SPEC, "--cpu", "--alone", *BACKEND)
    assert report["ran"]["backend"] == "vllm_avl.backend.cpu.AVLBackend"
    assert report["alone"] == report["tokens"]
    return report


def check(report, expected):
    assert report["ran"]["worker"] == "vllm_avl.compat.worker.AVLWorker"
    assert report["ran"]["backend"] == "vllm_avl.backend.triton.AVLTritonBackend"
    assert report["tokens"] == expected["tokens"]
    for ours, theirs in zip(report["logprobs"], expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=BUDGET)


@pytest.mark.timeout(1800)
def test_both_runners_answer_as_the_cpu_does(model, expected):
    for runner in ("v1", "v2"):
        report = generate(model, SPEC, "--runner", runner, "--alone", *BACKEND)
        check(report, expected)
        # In company and on one's own, cold and over one's own or others' prefix.
        assert report["alone"] == report["tokens"], runner


@pytest.mark.timeout(1800)
def test_graphs_read_what_this_step_reads(model, expected):
    for runner in ("v1", "v2"):
        report = generate(
            model,
            SPEC | {"llm": SPEC["llm"] | GRAPHS},
            *("--runner", runner, *BACKEND),
            VLLM_USE_BREAKABLE_CUDAGRAPH="1",
        )
        check(report, expected)
        # Most steps have work for Python, which a full graph would skip.
        assert report["graphs"]["replayed"] > 0


@pytest.mark.timeout(900)
def test_what_is_not_adapted_is_answered_as_by_stock(model, expected):
    requests = [SPEC["requests"][index] for index in AS_STOCK]
    stock = generate(model, {"requests": requests}, "--cpu", "--backend", "CPU_ATTN")
    assert stock["tokens"] == [expected["tokens"][index] for index in AS_STOCK]
