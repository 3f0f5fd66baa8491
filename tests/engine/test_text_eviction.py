"""A long answer stays within its window's blocks, and the pool shows it."""

import pytest

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine

NUM_TOKENS = 1500
SIZE = models.ModelSize(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    checkpoint = models.build("llava", tmp_path_factory.mktemp("tiny") / "llava", SIZE)
    engine = Engine(checkpoint, max_model_len=3000, max_num_seqs=4)
    yield engine
    engine.shutdown()


def test_held_blocks_follow_the_plan_and_stop_at_a_third_of_stocks_text(engine):
    """T = 0.3: held is what the plan says after every step of 1500."""
    settings = {"avl_text_keep_ratio": 0.3, "avl_core_ratio": 0.2}
    ask = Ask((1,), "Tell me all of it.", NUM_TOKENS, tuple(settings.items()))
    engine.add("long", ask)
    manager = engine.scheduler._avl_manager
    held, answer = [], {}
    while not answer:
        before = {r.num_computed_tokens for r in engine.scheduler.requests.values()}
        known = dict(manager.adapted)
        answer = engine.step()
        for request in engine.scheduler.requests.values():
            (one,) = known.values() or manager.adapted.values()
            plan = one.plan
            blocks = manager.req_to_blocks[request.request_id]
            held.append(sum(not block.is_null for block in blocks))
            length = request.num_computed_tokens
            needed = -(-length // plan.block_size)
            assert held[-1] == needed - plan.num_freed_blocks(before.pop())
            after = blocks[: plan.num_freed_blocks(length - 1)]
            assert all(block.is_null for block in after)
        engine.poison_free_blocks()
        engine.check_integrity()
    assert len(answer["long"]) == NUM_TOKENS
    length = plan.num_prompt_tokens + NUM_TOKENS
    stock_text = plan.num_text_tokens(length)
    window = plan.text_window.size(stock_text)
    kept_text = stock_text - plan.num_evicted_text_blocks(length) * plan.block_size
    assert window <= kept_text < window + plan.block_size
    assert kept_text <= stock_text / 3
    # What is held besides: stored vision, the text in front of it, the partial block.
    fixed = plan.num_stored_vision + plan.vision_ranges[0][0] + plan.block_size
    assert held[-1] <= -(-(fixed + kept_text) // plan.block_size)
    # The last third of the answer grows by a third of what it would be in stock.
    grown = held[-1] - held[-NUM_TOKENS // 3]
    assert grown <= NUM_TOKENS / 3 / plan.block_size * 0.3 + 1


def test_text_in_front_of_the_first_image_stays(engine):
    settings = (("avl_text_keep_ratio", 0.1), ("avl_store_ratio", 1))
    ask = Ask((1,), "?", 200, settings, prefix="A system prompt that stays. " * 4)
    engine.add("prefix", ask)
    worker = engine.core.model_executor.driver_worker.worker
    reports = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        reports += [worker.avl_report(name) for name in worker.avl_requests()]
    first_image = reports[-1].layers[0].core[0][0]
    assert first_image > 100
    for layer in reports[-1].layers:
        for text in layer.text:
            assert set(range(first_image)) <= set(text)
            assert len(text) < first_image + 200
