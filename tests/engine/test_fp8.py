"""With an fp8 cache, what is stored, read and answered follows the cached numbers."""

from dataclasses import replace

import pytest
from fp8_caches import NEEDS_FP8

from benchmarks.testing.engine import Ask

pytestmark = NEEDS_FP8

HALF = {"store_ratio": 0.5, "introspection": 4}
ASKS = [
    Ask((1,), "What is it?", 24),
    Ask((2, 3), "Compare the two.", 40, (("avl_core_ratio", 0.2),)),
    Ask(
        (4, 5, 6),
        "And these?",
        50,
        (("avl_core_ratio", 0.2), ("avl_text_keep_ratio", 0.3)),
    ),
    Ask((2,), "What?", 12, (("avl_policy", "h2o"), ("avl_core_ratio", 0.2))),
    Ask((), "No picture at all.", 8),
]
ASKS_OF_STOCK = [replace(ask, xargs=()) for ask in ASKS]


def evicted(engine, ask):
    """Of each layer, the set of positions that a request has evicted."""
    engine.llm.reset_prefix_cache()
    engine.ask([ask], max_tokens=2)
    worker = engine.core.model_executor.driver_worker.worker
    report = worker.avl_report(worker.avl_requests()[-1])
    return [{p for head in layer.evicted for p in head} for layer in report.layers]


def agreement(engines, cache_dtype, other="auto"):
    """Jaccard index of what is evicted with two caches, of each request and layer."""
    one, two = (
        engines(avl=HALF, dtype="bfloat16", kv_cache_dtype=dtype)
        for dtype in (cache_dtype, other)
    )
    return [
        len(first & second) / len(first | second)
        for seeds in ((1,), (2, 3), (4, 5, 6))
        for first, second in zip(
            evicted(one, Ask(seeds, "What is to be seen?")),
            evicted(two, Ask(seeds, "What is to be seen?")),
            strict=True,
        )
    ]


def test_what_is_evicted_is_nearly_what_bfloat16_evicts(engines):
    found = agreement(engines, "fp8")
    assert min(found) >= 0.85


@pytest.mark.parametrize("block_size", [32, 128])
def test_all_ratios_1_give_the_tokens_of_stock(engines, block_size):
    options = {"kv_cache_dtype": "fp8_e4m3", "dtype": "bfloat16"}
    options["block_size"] = block_size
    ones = dict.fromkeys(("store_ratio", "core_ratio"), 1.0)
    ours = engines(avl=ones | {"text_keep_ratio": 1}, **options)
    assert ours.ask(ASKS_OF_STOCK) == engines(avl=None, **options).ask(ASKS_OF_STOCK)


def test_a_batch_answers_as_each_request_alone(engines):
    engine = engines(kv_cache_dtype="fp8")
    alone = [engine.alone(ask) for ask in ASKS]
    engine.llm.reset_prefix_cache()
    assert engine.ask(ASKS) == alone
