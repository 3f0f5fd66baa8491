"""Gemma 3 and 4 on vLLM's CUDA code path: pictures that are seen in both directions.

vLLM's CPU build has no such mask, so what is right is what Hugging Face's model says.
"""

from functools import cache

import pytest

from standin import checkpoint
from standin.asks import ON_TRITON, ask, check_orders
from standin.eager import STOCK, Eager, check_answer
from standin.process import generate

WINDOWED = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
FULL_LAYER, NUM_KV_HEADS, BLOCK_SIZE = 2, 2, 16
NUM_TOKENS = 3
ASKS = [
    ask(1, max_tokens=NUM_TOKENS),
    ask(1, max_tokens=NUM_TOKENS, avl=0),
    # Its window of 32 tokens would reach into the picture.
    ask(3, text="?", max_tokens=NUM_TOKENS, avl_policy="snapkv"),
]
LLM = {
    "block_size": BLOCK_SIZE,
    "max_model_len": 320,
    "max_num_seqs": 8,
    # A picture of which a chunk has computed a part has not been seen to its end.
    "disable_chunked_mm_input": True,
    "enable_prefix_caching": True,
}
LIMITS = {
    "gemma3": {"limit_mm_per_prompt": {"image": 2}},
    # A video may have more tokens than a step.
    "gemma4": {"limit_mm_per_prompt": {"image": 2, "video": 0}},
}
ORDERS = [[[1], [0], [1]]]


BUILD = {"gemma3": checkpoint.build_gemma3, "gemma4": checkpoint.build_gemma4}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    return cache(lambda family: BUILD[family](folder / family))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("family", "runner"), [("gemma3", "v1"), ("gemma3", "v2"), ("gemma4", "v2")]
)
def test_what_is_kept_and_said_is_what_an_eager_model_says(model_of, family, runner):
    model = model_of(family)
    requests = [one | {"family": family} for one in ASKS]
    options = ("--runner", runner, "--logprobs", "--kept")
    avl = {"store_ratio": 0.5, "introspection": 8}
    spec = {"requests": requests, "orders": ORDERS}
    spec["llm"] = LLM | LIMITS[family] | {"additional_config": {"avl": avl}}
    report = generate(model, spec, *options, "--backend", "AVL")
    assert report["ran"]["backend"] == f"{WINDOWED}, {ON_TRITON}"
    eager = Eager(model, FULL_LAYER)
    kept = dict(zip((0, 2), report["kept"], strict=True))
    for index, request in enumerate(requests):
        of_request = kept.get(index, STOCK)
        check_answer(eager, request, report, index, of_request, BLOCK_SIZE)
    assert len(kept[0]["evicted"][0][0]) >= 32
    assert len(set(map(tuple, kept[2]["evicted"][0]))) == NUM_KV_HEADS
    assert report["logprobs"][0] != pytest.approx(report["logprobs"][1], abs=0.01)
    check_orders(report, report["tokens"], ORDERS)
    hits = report["orders"][0]["hits"]
    assert hits[0] == 0 < min(hits[1:])
