"""The model families vLLM's CPU build serves, unmodified."""

import pytest

from benchmarks.testing.engine import Ask

ASKS = [
    Ask((1,), "What is it?", 24),
    Ask((2, 3, 5), "Compare these.", 24),
    Ask((), "No picture.", 12),
    Ask((4,), "And this one?", 30, prefix=""),
]


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "internvl"]
)
def test_identity_eviction_and_batches(name, engines):
    stock = engines(name, avl=None, limit_mm_per_prompt={"image": 3})
    ours = engines(name, avl={"store_ratio": 0.3}, limit_mm_per_prompt={"image": 3})
    expected = stock.ask(ASKS)
    off = [Ask(a.images, a.text, a.max_tokens, (("avl", 0),)) for a in ASKS]
    assert ours.ask(off) == expected
    alone = [ours.alone(ask) for ask in ASKS]
    assert alone != expected
    assert alone[2] == expected[2]
    ours.llm.reset_prefix_cache()
    for i, ask in enumerate(ASKS):
        ours.add(str(i), ask)
    answers, freed = {}, 0
    while len(answers) < len(ASKS):
        ours.poison_free_blocks()
        answers |= ours.step()
        ours.check_integrity()
        freed = max(freed, num_null_blocks(ours))
    assert [answers[str(i)] for i in range(len(ASKS))] == alone
    assert freed > 0


def num_null_blocks(engine):
    blocks = engine.scheduler._avl_manager.req_to_blocks.values()
    return sum(block.is_null for held in blocks for block in held)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_chunks_smaller_than_an_image(name, engines):
    settings = {"avl": {"store_ratio": 0.3}, "dtype": "float32"}
    whole = engines(name, **settings)
    chunked = engines(name, max_num_batched_tokens=100, **settings)
    assert chunked.ask(ASKS) == whole.ask(ASKS)


def test_placeholders_that_are_not_embedded_count_as_text(engines):
    """Idefics3 has row and column markers inside an image's placeholder."""
    engine = engines("idefics3", avl={"store_ratio": 0.3})
    engine.llm.reset_prefix_cache()
    engine.add("x", ASKS[0])
    engine.step()
    (request,) = engine.scheduler.requests.values()
    (known,) = engine.scheduler._avl_manager.adapted.values()
    plan = known.plan
    position = request.mm_features[0].mm_position
    assert len(plan.vision_ranges) > 1
    assert plan.num_vision_tokens <= position.get_num_embeds() < position.length
    while not engine.step():
        pass
