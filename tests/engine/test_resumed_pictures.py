"""A preempted request that has lost its prefix-cache hits: its pictures are sent."""

import pytest
from hand_driven import make_scheduler, outputs_of, request
from vllm.multimodal.inputs import MultiModalKwargsItem

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine
from vllm_avl.scheduler.scheduler import AVLScheduler

STOCK = (("avl", 0),)
ASK = Ask((1, 2), "What do you see?", 40, STOCK)


@pytest.fixture
def start(tmp_path):
    checkpoint = models.build("llava", tmp_path / "llava", models.TINY)
    engines = []

    def start(avl):
        # The encoder's cache holds one picture.
        options = {"max_model_len": 1400, "max_num_batched_tokens": 600}
        memory = {"kv_cache_memory_bytes": 200 * 32 * 512}
        engines.append(Engine(checkpoint, avl=avl, **options, **memory))
        return engines[-1]

    yield start
    for engine in engines:
        engine.shutdown()


def resume_without_hits(engine, ask):
    """Answer `ask` from cached blocks at first, and from none once it was preempted."""
    (expected,) = engine.ask([ask])
    engine.add("again", ask)
    engine.step()
    engine.step()
    engine.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    # Other pictures take the encoder's cache.
    engine.add("other", Ask((7, 8), "And here?", 2, STOCK))
    answers = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        answers |= engine.step()
    return answers["again"], expected


def test_it_is_answered_as_if_nothing_had_happened(start):
    tokens, expected = resume_without_hits(start({}), ASK)
    assert tokens == expected


def test_vllm_alone_still_ends_the_engine(start):
    """When this fails, `_send_pictures` in compat/scheduler.py can go."""
    with pytest.raises(RuntimeError, match="Encoder cache miss"):
        resume_without_hits(start(None), Ask(ASK.images, ASK.text, ASK.max_tokens))


def step(scheduler):
    """One chunk that holds a whole prompt, or one token of each that runs."""
    output = scheduler.schedule()
    scheduler.update_from_output(output, outputs_of(output))
    return output


def with_pixels(name):
    """A request about one picture, its tokens 60 to 636 of 696."""
    asked = request(name, 1, 5, text=60)
    for feature in asked.mm_features:
        feature.data = MultiModalKwargsItem()
    return asked


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_a_worker_is_sent_what_it_can_be_told_to_drop(engines, v2):
    """Runner V2 gets a request anew when it resumes, and so only what that asks for."""
    avl = {"store_ratio": 0.5}
    scheduler = make_scheduler(AVLScheduler, engines().core, 100, avl)
    scheduler.use_v2_model_runner = v2
    scheduler.add_request(with_pixels("first"))
    (new,) = step(scheduler).scheduled_new_reqs
    assert new.mm_features[0].data is not None
    while scheduler.has_unfinished_requests():
        step(scheduler)

    scheduler.add_request(with_pixels("again"))
    (new,) = step(scheduler).scheduled_new_reqs
    assert new.num_computed_tokens >= 636
    assert (new.mm_features[0].data is None) == v2

    scheduler.reset_prefix_cache(reset_running_requests=True)
    output = step(scheduler)
    assert output.num_scheduled_tokens == {"again": 696}
    if v2:
        (new,) = output.scheduled_new_reqs
        assert new.mm_features[0].data is not None
