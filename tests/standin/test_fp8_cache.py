"""fp8 caches on vLLM's CUDA code path: stock's answers, and nearly fp32's evictions."""

import pytest

from standin.asks import FLASH, ON_FLASH, ON_TRITON, ask
from standin.process import generate

SCALES = [0.25, 0.125, 0.5]
CORE = {"avl_core_ratio": 0.25, "avl_refresh_interval": 2}
ADAPTED = [
    ask(1, 2, max_tokens=3),
    ask(3, 4, max_tokens=4, **CORE),
    ask(5, 6, max_tokens=4, avl_text_keep_ratio=0.5, **CORE),
]
PLAIN = [ask(1, 2, max_tokens=3, avl=0), ask(text="No picture at all.", max_tokens=3)]
# One step for all prompts: the last bit of a number decides what it is rounded to, and
# a batch of another shape may differ in it.
LLM = {"kv_cache_dtype": "fp8", "max_num_seqs": 8, "max_num_batched_tokens": 1024}
AVL = {"store_ratio": 0.5, "introspection": 8}


def run(model, requests, *options, avl=None, environment=None, **llm):
    config = {} if avl is None else {"avl": avl}
    spec = {"requests": requests, "scales": SCALES}
    spec["llm"] = LLM | {"additional_config": config} | llm
    return generate(model, spec, "--logprobs", *options, **environment or {})


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("stock", "ours", "runner", "environment"),
    [("TRITON_ATTN", ON_TRITON, "v2", {}), ("FLASH_ATTN", ON_FLASH, "v1", FLASH)],
    ids=["triton", "flash"],
)
def test_stock_and_adapted_requests(model, stock, ours, runner, environment):
    options = ("--runner", runner, "--backend")
    requests = ADAPTED + PLAIN
    plain = [{**request, "xargs": {}} for request in requests]
    expected = run(model, plain, *options, stock, environment=environment)
    options = (*options, "AVL", "--kept")
    report = run(model, requests, *options, avl=AVL, environment=environment)
    assert report["ran"]["backend"] == ours
    num_adapted = len(ADAPTED)
    assert report["tokens"][num_adapted:] == expected["tokens"][num_adapted:]
    for index, logprobs in enumerate(expected["logprobs"]):
        # The first token is the prompt's, which nothing has left yet.
        first, *others = report["logprobs"][index]
        assert first == pytest.approx(logprobs[0], abs=1e-4)
        same = others == pytest.approx(logprobs[1:], abs=1e-4)
        assert same == (index >= num_adapted)
    on_cpu = run(
        model, ADAPTED, "--cpu", "--backend", "AVL", "--kept",
        avl=AVL, kv_cache_dtype="auto",
    )  # fmt: skip
    assert agreement(report["kept"], on_cpu["kept"]) >= 0.75


def agreement(some, others):
    """The least Jaccard index of what layers have evicted."""
    pairs = [
        (set(head), set(same))
        for request, theirs in zip(some, others, strict=True)
        for one, other in zip(request["evicted"], theirs["evicted"], strict=True)
        for head, same in zip(one, other, strict=True)
    ]
    assert all(one for one, _ in pairs)
    return min(len(one & other) / len(one | other) for one, other in pairs)
