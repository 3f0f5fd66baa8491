"""Qwen3.5 on vLLM's CUDA code path: recurrent states beside what is adapted.

vLLM's CPU kernels of these states have bf16 alone, so what is right is what Hugging
Face's model says in fp32.
"""

import pytest

from standin import checkpoint
from standin.asks import CORE, ON_TRITON, TORCH, ask, check_orders
from standin.eager import STOCK, Eager, check_answer
from standin.process import generate

STATES = "vllm.v1.attention.backends.gdn_attn.GDNAttentionBackend"
FULL_LAYER, BLOCK_SIZE = 2, 16
ADAPTED, LISTED = (0, 2, 3), 4
"""Requests that read all they have stored, and one that reads less: it has core."""
FIRST_TURN = "What is it?"
REQUESTS = [
    {**one, "family": "qwen3_5"}
    for one in (
        ask(1, text=FIRST_TURN, max_tokens=4),
        ask(1, text=FIRST_TURN, max_tokens=3, avl=0),
        ask(4, text="Why is it, and what?", max_tokens=3, avl_policy="snapkv"),
        ask(1, text=f"{FIRST_TURN}\nASSISTANT:ab\nUSER:Why?", max_tokens=3),
        ask(4, text="Why?", max_tokens=5, **CORE),
        ask(4, text="Why?", max_tokens=3, avl_store_ratio=1),
    )
]
LLM = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 8,
    # Prompts come in several steps, beside answers.
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
    # Stock prefers FlashInfer's, which is not there.
    "gdn_prefill_backend": "triton",
}
# Alone and cold; over one's own prefix; a second turn.
ORDERS = [[[0], [1], [3]], [[LISTED]]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return checkpoint.build_qwen3_5(tmp_path_factory.mktemp("standin") / "qwen3_5")


@pytest.fixture(scope="module")
def eager(qwen):
    return Eager(qwen, FULL_LAYER)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_what_is_kept_and_said_is_what_an_eager_model_says(qwen, eager, runner):
    options = ("--runner", runner, "--logprobs", "--kept")
    avl = {"store_ratio": 0.5, "introspection": 8}
    spec = {"requests": REQUESTS, "orders": ORDERS}
    spec["llm"] = LLM | {"additional_config": {"avl": avl}}
    report = generate(qwen, spec, *options, "--backend", "AVL", **TORCH)
    assert report["ran"]["backend"] == f"{STATES}, {ON_TRITON}"
    kept = dict(zip((*ADAPTED, LISTED), report["kept"], strict=True))
    for index, request in enumerate(REQUESTS):
        if index != LISTED:
            of_request = kept.get(index, STOCK)
            check_answer(eager, request, report, index, of_request, BLOCK_SIZE)
    assert all(len(of["evicted"][0][0]) >= 2 * BLOCK_SIZE for of in kept.values())
    assert report["logprobs"][0] != pytest.approx(report["logprobs"][1], abs=0.01)
    check_orders(report, report["tokens"], ORDERS)
    hits = report["orders"][0]["hits"]
    assert hits[0] == 0 < min(hits[1:])
    assert all(hit % BLOCK_SIZE == 0 for hit in hits)
