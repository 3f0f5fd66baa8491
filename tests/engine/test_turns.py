"""Later turns and other questions hit what they would on stock, less what scores."""

import pytest

from benchmarks.testing.engine import Ask

SETTINGS = {
    "stored": (),
    "core": (("avl_core_ratio", 0.2),),
    "all-stored-core": (("avl_store_ratio", 1), ("avl_core_ratio", 0.2)),
    "core-text": (("avl_core_ratio", 0.2), ("avl_text_keep_ratio", 0.3)),
    "h2o": (("avl_policy", "h2o"), ("avl_core_ratio", 0.2)),
}
FIRST = "What is there to be seen? Say it at length, and leave nothing out."
SECOND = FIRST + " A house, a tree and a cloud. And what of the other picture, then?"
BLOCK_SIZE = 32


@pytest.fixture
def engine(engines):
    engine = engines()
    engine.llm.reset_prefix_cache()
    return engine


def serve(engine, request_id, ask):
    """Answer, and say what was hit and how many pictures were encoded."""
    schedule, encoded, outputs = engine.scheduler.schedule, [], []

    def watched(*args, **kwargs):
        output = schedule(*args, **kwargs)
        encoded.extend(output.scheduled_encoder_inputs.values())
        return output

    engine.scheduler.schedule = watched
    try:
        engine.add(request_id, ask)
        while engine.llm.llm_engine.has_unfinished_requests():
            outputs += engine.llm.llm_engine.step()
    finally:
        engine.scheduler.schedule = schedule
    last = outputs[-1]
    tokens = list(last.outputs[0].token_ids)
    return (
        last.num_cached_tokens,
        sum(map(len, encoded)),
        tokens,
        len(last.prompt_token_ids),
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_second_turn_hits_the_whole_first_prompt(engine, settings):
    xargs = SETTINGS[settings]
    first, second = Ask((1, 2), FIRST, 20, xargs), Ask((1, 2), SECOND, 20, xargs)
    fresh = engine.alone(second)
    engine.llm.reset_prefix_cache()
    _, _, _, num_first = serve(engine, "first", first)
    hits, encoded, tokens, _ = serve(engine, "second", second)
    # The first answer is another than in the second prompt: stock hits no more.
    assert hits == num_first // BLOCK_SIZE * BLOCK_SIZE
    assert encoded == 0, "pictures behind hits are encoded again"
    assert tokens == fresh


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_question_again_leaves_what_scores(engine, settings):
    ask = Ask((3,), FIRST, 20, SETTINGS[settings])
    _, _, fresh, length = serve(engine, "once", ask)
    hits, encoded, tokens, _ = serve(engine, "again", ask)
    assert hits == (length - 32) // BLOCK_SIZE * BLOCK_SIZE
    assert encoded == 0
    assert tokens == fresh


@pytest.mark.parametrize("settings", SETTINGS)
def test_stock_and_adaptive_requests_share_a_prompt_in_every_order(engine, settings):
    asks = [
        Ask((1, 2), FIRST, 20, xargs) for xargs in (SETTINGS[settings], (("avl", 0),))
    ]
    fresh = [engine.alone(ask) for ask in asks]
    for order in ((0, 1), (1, 0), (0, 0), (1, 1)):
        engine.llm.reset_prefix_cache()
        for index in order:
            assert engine.ask([asks[index]]) == [fresh[index]], order
        assert engine.ask([asks[i] for i in order]) == [fresh[i] for i in order], order


def test_everything_stored_and_little_read_takes_no_block_of_its_own(engine):
    asks = [Ask((1, 2), FIRST, 30, SETTINGS["all-stored-core"])] * 2
    engine.ask(asks[:1])
    for index, ask in enumerate(asks):
        engine.add(f"{index}", ask)
    engine.step()
    engine.step()
    manager = engine.scheduler._avl_manager
    assert len(manager.adapted) == 2
    assert not any(known.private for known in manager.adapted.values())
    one, other = manager.req_to_blocks.values()
    num_full = min(known.plan.num_full_blocks for known in manager.adapted.values())
    num_hit = num_full - 2
    assert [b.block_id for b in one[:num_hit]] == [b.block_id for b in other[:num_hit]]
    assert all(block.block_hash is not None for block in one[:num_full])
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_questions_at_once_share_the_prompt_as_on_stock(engine, settings):
    endings = ("", " And then?", " And in front of it, what is there?", " Why?")
    asks = [Ask((1, 2), FIRST + end, 30, SETTINGS[settings]) for end in endings]
    alone = [engine.alone(ask) for ask in asks]
    engine.llm.reset_prefix_cache()
    engine.ask(asks[:1])
    for index, ask in enumerate(asks):
        engine.add(f"{index}", ask)
    held, outputs = [], []
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs += engine.llm.llm_engine.step()
        pool = engine.scheduler.kv_cache_manager.block_pool
        held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    answers = {out.request_id[0]: out.outputs[0].token_ids for out in outputs}
    assert [list(answers[f"{i}"]) for i in range(len(asks))] == alone
    prompt = len(outputs[-1].prompt_token_ids) // BLOCK_SIZE
    # One prompt, and what differs: the last rows of each, and its answer.
    assert max(held) <= prompt + len(asks) * 4
