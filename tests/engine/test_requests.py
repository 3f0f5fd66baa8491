"""A request's answer depends on nobody else: batch, cache, preemption (S < 1)."""

from dataclasses import replace

import pytest

from benchmarks.testing.engine import Ask
from vllm_avl import plan as plans

S = {"store_ratio": 0.3}
ASKS = [
    Ask((1,), "What is it?", 30),
    Ask((2, 3), "Compare the two.", 44),
    Ask((4, 5, 6), "And these three?", 12),
    Ask((), "No picture at all.", 20),
    Ask((7,), "Which colour is the largest shape of all?", 50),
]
MODES = {
    "plain": {},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "chunks-smaller-than-an-image": {"max_num_batched_tokens": 200},
    "block-128": {"block_size": 128},
    "window-32": {"avl": S | {"observation_window": 32}},
    "core": {"avl": S | {"core_ratio": 0.1}},
    "core-text": {
        "avl": S | {"core_ratio": 0.1, "text_keep_ratio": 0.3},
        "max_num_batched_tokens": 500,
    },
    "h2o": {"avl": S | {"policy": "h2o", "core_ratio": 0.1}},
}


@pytest.fixture(scope="module", params=MODES)
def engine(request, engines):
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "core-text":
            patched.setattr(plans, "TEXT_MIN_TOKENS", 8)
        yield engines(**({"avl": S} | MODES[request.param]))


@pytest.fixture(scope="module")
def expected(engine):
    return [engine.alone(ask) for ask in ASKS]


@pytest.fixture(scope="module")
def stock(engine):
    return [engine.alone(off(ask)) for ask in ASKS]


def off(ask):
    return replace(ask, xargs=(("avl", 0),))


def run(engine, arrivals, poison=False):
    """Step through `arrivals` {step: [(id, ask)]}; check integrity at every step."""
    answers, step = {}, 0
    total = sum(len(batch) for batch in arrivals.values())
    while len(answers) < total:
        for request_id, ask in arrivals.get(step, ()):
            engine.add(request_id, ask)
        if poison:
            engine.poison_free_blocks()
        answers |= engine.step()
        engine.check_integrity()
        step += 1
    return answers


def test_eviction_changes_answers(stock, expected):
    assert stock != expected


def test_in_a_batch_as_alone(engine, expected):
    engine.llm.reset_prefix_cache()
    assert engine.ask(ASKS) == expected


def test_arriving_one_by_one_with_poison_behind_the_shift(engine, expected):
    engine.llm.reset_prefix_cache()
    arrivals = {3 * i: [(str(i), ask)] for i, ask in enumerate(ASKS)}
    answers = run(engine, arrivals, poison=True)
    assert [answers[str(i)] for i in range(len(ASKS))] == expected


def test_asked_again(engine, expected):
    engine.llm.reset_prefix_cache()
    assert [engine.ask(ASKS), engine.ask(ASKS)] == [expected, expected]


def test_stock_and_adaptive_over_one_prefix(engine, expected, stock):
    """Whoever came first, and in one step: each gets what a fresh server gives."""
    mixed = [a for ask in ASKS for a in (ask, off(ask), ask)]
    both = [a for e, s in zip(expected, stock, strict=True) for a in (e, s, e)]
    engine.llm.reset_prefix_cache()
    assert [engine.ask(mixed), engine.ask(mixed)] == [both, both]
    engine.llm.reset_prefix_cache()
    assert engine.ask([off(ask) for ask in ASKS]) == stock
    assert engine.ask(ASKS) == expected


def test_second_chat_turn(engine):
    first = Ask((1,), "What is it?", 40)
    engine.alone(first)
    turn = first.text + "\nASSISTANT: It is red.\nUSER: And what is behind it?"
    second = Ask((1,), turn, 30)
    warm = engine.ask([second])[0]
    assert warm == engine.alone(second)


def test_different_ratios_in_one_batch(engine):
    asks = [
        Ask((i,), "What is it?", 20, (("avl_store_ratio", ratio),))
        for i, ratio in enumerate((0.1, 0.5, 0.9, 1))
    ]
    expected = [engine.alone(ask) for ask in asks]
    engine.llm.reset_prefix_cache()
    assert engine.ask(asks) == expected


def test_aborts_give_every_block_back(engine, expected):
    engine.llm.reset_prefix_cache()
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for steps in (0, 1, 2, 5, 20):
        for i, ask in enumerate(ASKS):
            engine.add(f"{steps}-{i}", ask)
        for _ in range(steps):
            engine.step()
            engine.check_integrity()
        for i in range(len(ASKS)):
            engine.abort(f"{steps}-{i}")
        engine.step()
        engine.check_integrity()
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == free
    engine.llm.reset_prefix_cache()
    assert engine.ask(ASKS) == expected


def test_blocks_come_free_after_prefill(engine):
    ask = Ask((1, 2, 3), "Three.", 30)
    engine.llm.reset_prefix_cache()
    manager = engine.scheduler._avl_manager
    engine.add("x", ask)
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        for blocks in manager.req_to_blocks.values():
            held.append(sum(not block.is_null for block in blocks))
            (known,) = manager.adapted.values()
    freed = max(held) - min(held[held.index(max(held)) :])
    plan = known.plan
    assert plan.first_stored_block > 0.5 * plan.num_full_blocks
    assert freed >= plan.first_stored_block


def test_preemption(engines):
    """Preempted requests replay and answer as if nothing had happened."""
    engine = engines(avl=S, kv_cache_memory_bytes=5 << 20, max_model_len=1024)
    asks = [Ask((i,), "What is it?", 350) for i in range(4)]
    expected = [engine.alone(ask) for ask in asks]
    engine.llm.reset_prefix_cache()
    preemptions = count_preemptions(engine)
    answers = run(engine, {0: [(str(i), a) for i, a in enumerate(asks)]}, poison=True)
    assert preemptions, "the pool is too large for this test"
    assert [answers[str(i)] for i in range(4)] == expected


def count_preemptions(engine):
    seen = []
    original = engine.scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        seen.append((request.request_id, request.num_output_tokens))
        return original(request, *args, **kwargs)

    engine.scheduler._preempt_request = preempt
    return seen
