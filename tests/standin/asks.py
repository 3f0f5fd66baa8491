"""A batch of everything that differs between requests, and how answers compare."""

import pytest

from standin.process import generate

STORE = 0.5
CORE = {"avl_core_ratio": 0.25, "avl_refresh_interval": 2}
TEXT = {"avl_text_keep_ratio": 0.3}
LONG = "What is it? " * 6


def ask(*images, text="What is it?", max_tokens=8, **xargs):
    """One request; what it leaves out is not left to the server's settings."""
    store = xargs.get("avl_store_ratio", STORE)
    if images:
        xargs = {"avl_core_ratio": store, "avl_text_keep_ratio": 1} | xargs
    return {
        "images": list(images),
        "text": text,
        "max_tokens": max_tokens,
        "xargs": xargs,
    }


SPEC = {
    "requests": [
        # Longer than those whose core no graph of some servers reads.
        ask(1, 2, max_tokens=17),
        ask(1, 2, max_tokens=17, avl=0),
        ask(3, 4, 5, **CORE),
        ask(6, 7, text=LONG, max_tokens=12, **CORE, **TEXT),
        ask(8, 9, avl_policy="h2o", **CORE),
        ask(10, 11, avl_policy="snapkv", avl_store_ratio=0.3),
        ask(12, 13, avl_store_ratio=1),
        ask(text="No picture at all."),
    ],
    "llm": {
        "additional_config": {"avl": {"store_ratio": STORE}},
        "enable_prefix_caching": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "limit_mm_per_prompt": {"image": 3},
    },
}
ALL = {"store_ratio": 1, "core_ratio": 1, "text_keep_ratio": 1}
# Requests 0 (adapted) and 1 (stock) ask the same about the same pictures.
ORDERS = [[[0], [1]], [[1], [0]], [[0], [0]], [[1, 0]], [[0, 1], [1, 0]]]
AS_STOCK = [1, 6, 7]
"""Requests that must be served as if we were not there."""
BUDGET = 1e-4
"""Log-probabilities of fp32, on two kernels' orders of summation."""
BACKEND = ("--backend", "AVL", "--logprobs")


def answer_on_cpu(model):
    """The CPU back end's answers, which the oracle of tests/engine stands behind."""
    report = generate(model, SPEC, "--cpu", "--alone", *BACKEND)
    assert report["ran"]["backend"] == "vllm_avl.worker.cpu.backend.AVLBackend"
    assert report["alone"] == report["tokens"]
    adapted, stock = report["logprobs"][:2]
    assert adapted != pytest.approx(stock, abs=100 * BUDGET), "nothing was evicted"
    return report


FLASH = {"STANDIN_FLASH": "1"}
"""Environment of a stand-in with FlashAttention."""
TORCH = {"STANDIN_ATTENTION": "torch"}
"""Environment of one whose Triton attention, vLLM's own, is not interpreted."""
ON_TRITON = "vllm_avl.worker.cuda.triton.AVLTritonBackend"
ON_FLASH = "vllm_avl.worker.cuda.flash.AVLFlashBackend"


LISTS = {
    "none": {},
    "one": {"core_ratio": 0.25},
    "many": {"core_ratio": 0.25, "text_keep_ratio": 0.9},
}
"""Settings of servers whose graphs read no list of core, one a layer, one a KV head."""


def spec(lists, attention="auto", **llm):
    """`SPEC` on a server of `LISTS`, over an attention of vLLM's."""
    settings = {"store_ratio": STORE, "attention": attention}
    config = {"avl": settings | LISTS[lists]}
    return SPEC | {"llm": SPEC["llm"] | {"additional_config": config} | llm}


def check(report, expected, backend=ON_TRITON):
    """Assert that a report on the stand-in is what is expected."""
    assert report["ran"]["worker"] == "vllm_avl.worker.worker.AVLWorker"
    assert report["ran"]["backend"] == backend
    assert report["tokens"] == expected["tokens"]
    for ours, theirs in zip(report["logprobs"], expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=BUDGET)


def check_orders(report, expected, orders=ORDERS):
    """Assert that a prefix somebody has left behind changes no answer."""
    for order, answers in zip(orders, report["orders"], strict=True):
        indices = [index for batch in order for index in batch]
        assert answers["tokens"] == [expected[index] for index in indices]
