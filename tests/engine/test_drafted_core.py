"""Steps with drafts where not all that is stored is read, and where text ages."""

from itertools import pairwise

import pytest
from following import IMAGES, TEXT, compare, watch
from oracle import Oracle
from scripted_drafts import CONFIG, REPEATABLE_CONFIG, WRONG_CONFIG, Scripted

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine

CORE = {"avl_core_ratio": 0.2, "avl_refresh_interval": 3}
SETTINGS = {
    "core": CORE,
    "everything-stored": CORE | {"avl_store_ratio": 1},
    "text": {"avl_text_keep_ratio": 0.3},
    "core-and-text": CORE | {"avl_text_keep_ratio": 0.5},
    "h2o": CORE | {"avl_policy": "h2o", "avl_text_keep_ratio": 0.4},
    "streaming": CORE | {"avl_policy": "streaming"},
    "random": CORE | {"avl_policy": "random", "avl_store_ratio": 0.3},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    checkpoint = models.build(
        "llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY
    )
    engines = []

    def start(**options):
        engines.append(Engine(checkpoint, max_model_len=2048, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def plain(start):
    return start()


def asks_of(settings, length=70):
    """Two share a picture and a prompt's beginning, and are served at once."""
    xargs = tuple(settings.items())
    return [
        Ask((1,), "What is it?", length, xargs),
        Ask((1,), "What is it? And where?", length, xargs),
        Ask((2, 3), "Compare them.", length, xargs, "A system prompt. "),
    ]


def serve(engine, asks):
    """Answer at once, with an abort among them; freed blocks hold nonsense."""
    for index, one in enumerate(asks):
        engine.add(f"{index}", one)
    engine.add("gone", asks[0], max_tokens=60)
    answers, num_steps = {}, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        if num_steps == 7:
            engine.abort("gone")
        engine.poison_free_blocks()
        answers |= engine.step()
        engine.check_integrity()
        num_steps += 1
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return [answers[f"{index}"] for index in range(len(asks))]


@pytest.fixture(scope="module")
def rejecting(start):
    return start(speculative_config=WRONG_CONFIG)


@pytest.mark.parametrize("settings", SETTINGS)
def test_rejected_drafts_leave_no_trace(plain, rejecting, settings):
    """In a first turn, and in a second one over the same prompts."""
    asks = asks_of(SETTINGS[settings])
    wanted = [plain.alone(one) for one in asks]
    everything = asks_of({"avl_store_ratio": 1})
    assert all(plain.alone(everything[i]) != wanted[i] for i in range(3))
    rejecting.llm.reset_prefix_cache()
    for _ in range(2):
        assert serve(rejecting, asks) == wanted


@pytest.fixture(scope="module")
def drafting(start):
    return start(speculative_config=CONFIG, avl={"introspection": 4})


@pytest.mark.parametrize("policy", ["avl", "h2o", "fastv"])
def test_accepted_drafts_read_the_same_core(plain, drafting, policy):
    """Until core is chosen anew, and here it never is."""
    settings = CORE | {"avl_refresh_interval": 1000, "avl_policy": policy}
    asks = asks_of(settings)
    wanted = [plain.alone(one) for one in asks]
    for one, answer in zip(asks, wanted, strict=True):
        Scripted.teach_to(plain, one, answer)
    before = Scripted.num_accepted
    drafting.llm.reset_prefix_cache()
    for _ in range(2):
        assert serve(drafting, asks) == wanted
    assert Scripted.num_accepted - before > 100


@pytest.mark.parametrize("settings", ["core", "core-and-text", "h2o"])
def test_a_preempted_request_replays_as_without_drafts(plain, rejecting, settings):
    (one, *_) = asks_of(SETTINGS[settings])
    assert preempted(rejecting, one) == preempted(plain, one)


def preempted(engine, one):
    """The answer of a request that is preempted once."""
    engine.llm.reset_prefix_cache()
    engine.add("one", one)
    for _ in range(12):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    (request,) = engine.scheduler.waiting
    answers = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.poison_free_blocks()
        answers |= engine.step()
        engine.check_integrity()
    assert request.num_preemptions == 1
    return answers["one"]


FOLLOWED = {
    "core": {"core_ratio": 0.3, "refresh_interval": 4},
    "core-and-text": {
        "core_ratio": 0.3,
        "refresh_interval": 5,
        "text_keep_ratio": 0.2,
    },
    "everything-stored": {"store_ratio": 1, "core_ratio": 0.4, "refresh_interval": 3},
    "text": {"text_keep_ratio": 0.2, "refresh_interval": 2},
    "h2o": {"policy": "h2o", "core_ratio": 0.3, "refresh_interval": 6},
    "random": {"policy": "random", "core_ratio": 0.2, "refresh_interval": 4},
}


@pytest.mark.parametrize("settings", FOLLOWED)
def test_stored_core_and_logits(engines, checkpoints, settings):
    named = {f"avl_{name}": value for name, value in FOLLOWED[settings].items()}
    one = Ask(IMAGES["two"], TEXT["two"], 48, tuple(named.items()))
    options = {"kv_cache_memory_bytes": 256 << 20, "avl": {"introspection": 16}}
    engine = engines(**options)
    drafting = engines(**options, speculative_config=REPEATABLE_CONFIG)
    told, answer, turn = engine.alone(one), None, 0

    def poison(answers):
        drafting.poison_free_blocks()

    # Drafts change an answer, which is drafted then, until it is what was drafted.
    while answer is None or answer.tokens != told:
        told = told if answer is None else answer.tokens
        Scripted.taught.clear()
        Scripted.teach_to(engine, one, told)
        drafting.llm.reset_prefix_cache()
        (answer,) = watch(drafting, [one], f"{settings}.{turn}", poison)
        turn += 1
        assert turn < 20
    lengths = sorted(n for n in answer.reports if n < len(answer.tokens))
    sizes = [after - length for length, after in pairwise(lengths)]
    assert max(sizes) == 4
    assert sizes.count(1) < len(sizes) / 2, sizes
    oracle = Oracle(checkpoints("llava"))
    assert compare(drafting, oracle, one, answer, sizes=sizes) <= 2
