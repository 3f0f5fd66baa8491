"""Off or S = C = T = 1 is token-identical to stock vLLM, in every mode."""

from dataclasses import replace

import pytest
import torch
from fp8_caches import NEEDS_FP8

from benchmarks.testing.engine import Ask

ASKS = [
    Ask((1,), "What is it?", 24),
    Ask((), "No picture at all.", 8),
    Ask((2, 3), "Compare the two.", 40),
    Ask((4, 5, 6), "And these three?", 12),
    Ask((1,), "What is it?", 24),
]

MODES = {
    "plain": {},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "chunks-smaller-than-an-image": {"max_num_batched_tokens": 200},
    "small-pool": {"kv_cache_memory_bytes": 20 << 20, "max_model_len": 2048},
    "block-128": {"block_size": 128},
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"kv_cache_dtype": "fp8"},
    "compiled": {"enforce_eager": False},
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(mode, marks=NEEDS_FP8 if mode == "fp8" else ()) for mode in MODES
    ],
)
def pair(request, engines):
    options = MODES[request.param]
    stock = engines(avl=None, **options)
    settings = dict.fromkeys(("store_ratio", "core_ratio"), 1.0)
    return stock, engines(avl=settings | {"text_keep_ratio": 1}, **options)


def test_greedy_batch(pair):
    stock, ours = pair
    assert ours.ask(ASKS) == stock.ask(ASKS)


def test_sampled_batch(pair):
    # One global seed: vLLM's CPU build cannot rewind a request's own generator.
    def sampled(engine):
        torch.manual_seed(5)
        return engine.ask(ASKS, temperature=0.8, top_p=0.9)

    stock, ours = pair
    assert sampled(ours) == sampled(stock)


def test_off_by_request(engines):
    stock, ours = engines(avl=None), engines(avl={"store_ratio": 0.2})

    def with_xargs(**xargs):
        return [replace(ask, xargs=tuple(xargs.items())) for ask in ASKS]

    expected = stock.ask(ASKS)
    assert ours.ask(with_xargs(avl=0)) == expected
    assert ours.ask(with_xargs(avl_store_ratio=1)) == expected
    assert ours.ask(with_xargs(avl_policy="full")) == expected


def test_text_only_and_single_token_are_stock(engines):
    stock, ours = engines(avl=None), engines(avl={"store_ratio": 0.2})
    asks = [Ask((), "No picture.", 12), Ask((1, 2), "One token.", 1)]
    assert ours.ask(asks) == stock.ask(asks)


def test_n_above_one_is_stock(engines):
    stock, ours = engines(avl=None), engines(avl={"store_ratio": 0.2})
    sampling = {"n": 3, "temperature": 0.8, "max_tokens": 12}

    def children(engine):
        torch.manual_seed(3)
        outputs = engine.llm.generate(
            engine.prompt(ASKS[2]), ASKS[2].params(**sampling), use_tqdm=False
        )
        return [list(completion.token_ids) for completion in outputs[0].outputs]

    assert children(ours) == children(stock)


def test_beam_search_is_stock(engines):
    from vllm.sampling_params import BeamSearchParams

    stock, ours = engines(avl=None), engines(avl={"store_ratio": 0.2})

    def beams(engine):
        params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
        (output,) = engine.llm.beam_search([engine.prompt(ASKS[0])], params)
        return [list(beam.tokens) for beam in output.sequences]

    assert beams(ours) == beams(stock)
