"""What an engine reports agrees with its block pool, to the block, at every step."""

import random

import pytest
from prometheus_client import REGISTRY

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine
from vllm_avl.metrics.definitions import COUNTERS, PREFIX, Stage, Stock

BLOCK_BYTES = 32 * 512
CORE = (("avl_core_ratio", 0.2),)
TEXT = (("avl_store_ratio", 0.4), ("avl_text_keep_ratio", 0.3))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    checkpoint = models.build(
        "llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY
    )
    engine = Engine(
        checkpoint,
        kv_cache_memory_bytes=100 * BLOCK_BYTES,
        max_model_len=1400,
        max_num_seqs=6,
        max_num_batched_tokens=500,
        disable_log_stats=False,
    )
    yield engine
    engine.shutdown()


def metric(engine, name, **labels):
    model = engine.llm.llm_engine.vllm_config.model_config.served_model_name
    labels |= {"model_name": model, "engine": "0"}
    return REGISTRY.get_sample_value(PREFIX + name, labels)


def counters(engine):
    names = [f"{m.name}_total" for m in COUNTERS if m.label is None]
    return {name: metric(engine, name) for name in names}


def added(engine, asks):
    """Answer `asks` in one batch; return what each counter grew by."""
    engine.llm.reset_prefix_cache()
    before = counters(engine)
    engine.ask(asks)
    return {name: value - before[name] for name, value in counters(engine).items()}


def num_held(engine):
    pool = engine.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def test_blocks_held_agree_with_the_pool_under_load(engine):
    rng = random.Random(1)
    asked = seen = 0
    while asked < 40 or engine.llm.llm_engine.has_unfinished_requests():
        if asked < 40 and rng.random() < 0.3:
            images = rng.choice([(), (1,), (2, 3), (asked,)])
            xargs = rng.choice([(), CORE, TEXT, (("avl", 0),)])
            engine.add(f"load{asked}", Ask(images, "Why?", rng.randint(2, 90), xargs))
            asked += 1
        if rng.random() < 0.02:
            engine.abort(f"load{rng.randrange(asked + 1)}")
        engine.step()
        held, stock = (
            metric(engine, f"kv_blocks_{name}") for name in ("held", "stock")
        )
        assert held == num_held(engine)
        assert metric(engine, "kv_bytes_held") == held * BLOCK_BYTES
        assert metric(engine, "kv_bytes_stock") == stock * BLOCK_BYTES
        seen = max(seen, stock - held)
    assert seen > 20, "the load evicts too little"
    for name in ("kv_blocks_held", "kv_blocks_stock", "requests_running"):
        assert metric(engine, name) == 0


@pytest.mark.parametrize("xargs", [(), CORE, TEXT], ids=["stored", "core", "text"])
def test_blocks_without_eviction_are_what_stock_holds(engine, xargs):
    def blocks(name, xargs):
        engine.llm.reset_prefix_cache()
        for seed in (1, 2):
            engine.add(f"{name}{seed}{xargs}", Ask((seed,), "Why?", 90, xargs))
        seen = []
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            seen.append(metric(engine, name))
        return seen

    expected = blocks("kv_blocks_held", (("avl", 0),))
    assert blocks("kv_blocks_stock", xargs) == expected
    assert max(expected) > 40


def test_counts_of_one_request_follow_from_its_plan(engine):
    # 605 prompt tokens, 576 of them vision, of which 546 lie in 18 full blocks.
    grown = added(engine, [Ask((1,), "What is it?", 16)])
    assert grown["requests_adapted_total"] == 1
    assert grown["vision_tokens_evicted_total"] == 8 * 32
    assert grown["vision_tokens_stored_total"] == 576 - 8 * 32
    assert grown["text_tokens_stored_total"] == 605 - 576
    assert grown["blocks_freed_early_total"] == 8
    for name in ("refreshes", "core_rows_selected", "text_tokens_evicted"):
        assert grown[f"{name}_total"] == 0


def test_refreshes_and_what_they_change_are_counted(engine):
    grown = added(engine, [Ask((1,), "Why?", 16, CORE), Ask((2,), "Why?", 7, CORE)])
    # 15 and 6 steps after the first token, every third of which selects.
    assert grown["refreshes_total"] == 5 + 2
    entered, selected = (
        grown["core_rows_entered_total"],
        grown["core_rows_selected_total"],
    )
    assert 0 < entered < selected
    assert selected % (7 * models.TINY.num_layers) == 0


def test_evicted_text_is_counted_in_whole_blocks(engine):
    grown = added(engine, [Ask((1,), "Why?", 300, TEXT)])
    evicted = grown["text_tokens_evicted_total"]
    assert evicted > 100
    assert evicted % 32 == 0
    vision = grown["vision_tokens_evicted_total"]
    assert (vision + evicted) / 32 == grown["blocks_freed_early_total"]


def test_a_policy_that_ranks_text_does_not_claim_to_tell_it_apart(engine):
    grown = added(engine, [Ask((1,), "Why?", 4, (("avl_policy", "h2o"),))])
    assert grown["mixed_tokens_evicted_total"] == 8 * 32
    assert grown["vision_tokens_evicted_total"] == 0


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (Ask((), "Why?", 2), Stock.NO_VISION),
        (Ask((1,), "Why?", 1), Stock.ONE_TOKEN),
        (Ask((1,), "Why?", 2, (("avl", 0),)), Stock.OFF),
        (Ask((1,), "Why?", 2, (("avl_policy", "full"),)), Stock.POLICY_FULL),
        (Ask((1,), "Why?", 2, (("avl_store_ratio", 1),)), Stock.NOTHING_TO_SAVE),
    ],
)
def test_who_is_left_alone_is_counted_by_reason(engine, ask, reason):
    name = "requests_left_alone_total"
    before = {one: metric(engine, name, reason=one.value) for one in Stock}
    engine.ask([ask])
    after = {one: metric(engine, name, reason=one.value) for one in Stock}
    assert {one for one in Stock if after[one] != before[one]} == {reason}
    assert after[reason] == before[reason] + 1


def test_time_is_counted_by_stage(engine):
    before = {stage: metric(engine, "seconds_total", stage=stage) for stage in Stage}
    engine.ask([Ask((1,), "Why?", 100, (*CORE, ("avl_text_keep_ratio", 0.3)))])
    for stage, seconds in before.items():
        assert metric(engine, "seconds_total", stage=stage) > seconds
