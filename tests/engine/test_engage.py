"""engage: pressure: stock in every respect while blocks are not short."""

from collections import Counter

import pytest

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine
from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Plan
from vllm_avl.scheduler import pressure

BLOCK_BYTES = 32 * 512
# 605 tokens: 19 blocks, of which 8 go.
ASKS = [Ask((seed,), "What is it?", 40) for seed in range(8)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    checkpoint = models.build(
        "llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY
    )
    engines = []

    def start(num_blocks, avl, **options):
        engine = Engine(
            checkpoint,
            avl=avl,
            kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
            max_model_len=1400,
            max_num_batched_tokens=700,
            **({"max_num_seqs": 8} | options),
        )
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def expected(start):
    """Tokens of stock vLLM, and of requests that are all adapted."""
    engine = start(400, {})
    off = [Ask(a.images, a.text, a.max_tokens, (("avl", 0),)) for a in ASKS]
    return engine.ask(off), engine.ask(ASKS)


def decisions(engine, asks):
    """Answer `asks` in one batch; return tokens and what was decided of each."""
    made = {}
    scheduler = engine.scheduler
    decide = scheduler._decide

    def noted(request):
        made[request.request_id.split("-")[0]] = decision = decide(request)
        return decision

    scheduler._decide = noted
    tokens = engine.ask(asks)
    del scheduler._decide
    ordered = sorted(made.items(), key=lambda item: int(item[0]))
    return tokens, [decision for _, decision in ordered]


def test_with_room_nobody_is_adapted_and_tokens_are_stocks(start, expected):
    engine = start(400, {"engage": "pressure"})
    tokens, made = decisions(engine, ASKS)
    assert made == [Stock.NO_PRESSURE] * len(ASKS)
    assert tokens == expected[0]
    # Stock shares the whole prompt with whoever asks again; adaptive requests do not.
    outputs = engine.llm.generate(
        [engine.prompt(ASKS[0])], [ASKS[0].params()], use_tqdm=False
    )
    assert outputs[0].num_cached_tokens == 605 // 32 * 32


def test_a_burst_that_does_not_fit_is_adapted_from_its_first_request_on(
    start, expected
):
    # Adapted they fit, and as stock they do not.
    tokens, made = decisions(start(110, {"engage": "pressure"}), ASKS)
    assert [type(decision) for decision in made] == [Plan] * len(ASKS), made
    assert tokens == expected[1]


def test_it_engages_as_blocks_run_short_and_lets_go_again(start, expected):
    engine = start(100, {"engage": "pressure"})
    alone = [decisions(engine, [ask])[1][0] for ask in ASKS[:3]]
    assert alone == [Stock.NO_PRESSURE] * 3
    _, burst = decisions(engine, ASKS)
    assert isinstance(burst[-1], Plan)
    assert decisions(engine, ASKS[:1])[1] == [Stock.NO_PRESSURE]


def test_seats_hold_a_queue_up_not_blocks(start):
    engine = start(100, {"engage": "pressure"}, max_num_seqs=2)
    _, made = decisions(engine, ASKS)
    assert made == [Stock.NO_PRESSURE] * len(ASKS)


@pytest.mark.parametrize(
    ("num_at_once", "kind"), [(1, Stock), (4, Plan)], ids=["stock", "adapted"]
)
def test_a_preempted_request_stays_what_it_was(start, num_at_once, kind, monkeypatch):
    monkeypatch.setattr(pressure, "ENGAGE_AT", 1.0)
    engine = start(52, {"engage": "pressure"})
    preempted, made = Counter(), {}
    scheduler = engine.scheduler
    decide, preempt = scheduler._decide, scheduler._preempt_request

    def noted(request):
        decision = decide(request)
        if request.num_preemptions:
            assert decision == made[request.request_id]
        made[request.request_id] = decision
        return decision

    def noted_preempt(request, *args, **kwargs):
        preempted[type(made[request.request_id])] += 1
        return preempt(request, *args, **kwargs)

    scheduler._decide, scheduler._preempt_request = noted, noted_preempt
    # They fit as they come, and no longer as they grow.
    for name in range(4):
        engine.add(str(name), Ask((name,), "Long.", 400))
        for _ in range(3 if num_at_once == 1 and name < 1 else 0):
            engine.step()
        if num_at_once == 1 and name == 1:
            break
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        engine.check_integrity()
    engine.step()
    assert set(preempted) == {kind}
    assert scheduler._avl_decisions == {}
