"""Chunks of prompts with pictures: every request ends, and no picture is left behind.

Schedulers are driven by hand over random pictures, budgets, windows and policies, with
room for few pictures in the encoder's cache.
"""

import random

import pytest
from hand_driven import BLOCK_SIZE, asked, finish_step, make_scheduler
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from benchmarks.testing.engine import check_integrity
from vllm_avl.scheduler.scheduler import AVLScheduler

NUM_SEEDS = 30
LARGEST = 576
POLICIES = ("avl", "snapkv", "h2o", "fastv", "streaming")


def draw_requests(rng, max_tokens=5):
    requests = []
    for index in range(rng.randint(2, 7)):
        pictures = [
            (rng.randrange(6), rng.choice((100, 300, LARGEST)), rng.randint(0, 300))
            for _ in range(rng.randint(1, 3))
        ]
        # A picture has one size: vLLM looks it up by its name.
        pictures = [(f"{image}-{size}", size, text) for image, size, text in pictures]
        in_front = rng.randint(0, 60)
        if rng.random() < 0.5:
            # A whole number of blocks.
            length = in_front + sum(size + text for _, size, text in pictures)
            in_front += -length % BLOCK_SIZE
        requests.append(
            asked(
                f"{index}",
                in_front,
                pictures,
                rng.randint(2, max_tokens),
                priority=rng.randrange(3),
                avl_policy=rng.choice(POLICIES),
            )
        )
    return requests


def start(engines, rng, disable_chunked_mm_input):
    window = rng.choice((None, 1, 32, 256))
    settings = {"store_ratio": 0.5} | ({"observation_window": window} if window else {})
    scheduler = make_scheduler(
        AVLScheduler,
        engines().core,
        rng.choice((90, 130, 300)),
        settings,
        policy=rng.choice(("fcfs", "priority")),
        max_num_batched_tokens=rng.choice((LARGEST + 10, 700, 2000)),
        long_prefill_token_threshold=rng.choice((0, 600)),
        disable_chunked_mm_input=disable_chunked_mm_input,
    )
    cached = rng.choice((1, 2)) * LARGEST
    scheduler.encoder_cache_manager = EncoderCacheManager(cached)
    scheduler.max_num_encoder_input_tokens = cached
    return scheduler


def check_chunks(scheduler, output, whole_pictures):
    """What a step computes of each prompt."""
    for request_id, num_new in output.num_scheduled_tokens.items():
        request = scheduler.requests[request_id]
        end = request.num_computed_tokens
        plan = scheduler._avl_manager.plan_of(request_id)
        if plan is not None and end - num_new < plan.num_prompt_tokens:
            left = plan.num_prompt_tokens - end
            assert left == 0 or left >= plan.last_chunk
            assert left > 0 or num_new >= plan.last_chunk
        for feature in request.mm_features:
            first = feature.mm_position.offset
            last = first + feature.mm_position.length
            if whole_pictures and end - num_new < first:
                assert not first < end < last, "a chunk ends inside a picture"


def check_references(scheduler):
    """No request holds a picture that it has not begun, or has behind it, in a step."""
    cache = scheduler.encoder_cache_manager
    for mm_hash, holders in cache.cached.items():
        for request_id in holders:
            request = scheduler.requests[request_id]
            spans = [
                (f.mm_position.offset, f.mm_position.offset + f.mm_position.length)
                for f in request.mm_features
                if f.identifier == mm_hash
            ]
            assert any(first < request.num_computed_tokens for first, _ in spans), (
                f"{request_id} holds {mm_hash} and has computed nothing of it"
            )


def step(scheduler, whole_pictures=False):
    """Schedule a step, look at it, and let it sample."""
    output = scheduler.schedule()
    check_integrity(scheduler)
    check_chunks(scheduler, output, whole_pictures)
    check_references(scheduler)
    finish_step(scheduler, output)


@pytest.mark.parametrize("whole_pictures", [False, True])
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_request_ends_and_no_reference_outlives_its_step(
    engines, seed, whole_pictures
):
    rng = random.Random(seed)
    scheduler = start(engines, rng, whole_pictures)
    requests = draw_requests(rng)
    steps = 0
    while requests or scheduler.has_unfinished_requests():
        assert steps < 400, "nobody progresses"
        if requests and rng.random() < 0.6:
            scheduler.add_request(requests.pop())
        step(scheduler, whole_pictures)
        steps += 1
    assert not any(scheduler.encoder_cache_manager.cached.values())


def test_a_request_that_is_told_to_wait_lets_its_picture_go(engines):
    """Its rest is the last chunk, without room; another needs its picture's place."""
    scheduler = make_scheduler(
        AVLScheduler,
        engines().core,
        300,
        {"observation_window": 256, "policy": "snapkv"},
        policy="priority",
        max_num_batched_tokens=700,
        long_prefill_token_threshold=600,
    )
    scheduler.encoder_cache_manager = EncoderCacheManager(LARGEST)
    scheduler.max_num_encoder_input_tokens = LARGEST
    first, second = (("one", LARGEST, 56),), (("other", LARGEST, 64),)
    finish(scheduler, [asked("before", 8, first, 2)])
    # 500 of 700 tokens go to a text, and 256 are wanted.
    scheduler.add_request(asked("text", 500, (), 3, priority=0))
    scheduler.add_request(asked("waits", 8, first, 2, priority=2))
    step(scheduler)
    assert scheduler.requests["waits"].num_computed_tokens == 0
    finish(scheduler, [asked("needs", 0, second, 2, priority=1)])


def finish(scheduler, requests):
    for request in requests:
        scheduler.add_request(request)
    for _ in range(50):
        if not scheduler.has_unfinished_requests():
            return
        step(scheduler)
    pytest.fail("nobody progresses")
