"""The plan's integers, on hand-worked cases and against its definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_avl.config import AVLConfig
from vllm_avl.plan import ceil_ratio, limit_chunk, make_plan


def plan_of(num_tokens, ranges, block_size, ratio, window=1, **settings):
    settings = {"refresh_interval": 0} | settings
    config = AVLConfig(store_ratio=ratio, observation_window=window, **settings)
    return make_plan(num_tokens, ranges, block_size, config)


def test_counts_of_one_image_between_texts():
    # 5 text, 576 vision, 19 text: 600 tokens are 18 full blocks of 32 and 24 rows.
    plan = plan_of(600, [(5, 581)], 32, 0.5)
    assert plan.num_full_blocks == 18
    assert plan.ranked_ranges == ((5, 576),)
    # 5 text + ceil(571 / 2) = 291 rows, rounded up to 10 blocks.
    assert plan.num_stored_blocks == 10
    assert plan.num_stored_vision == 10 * 32 - 5
    assert plan.first_stored_block == plan.num_freed_blocks(600) == 8
    assert (plan.num_stored_rows, plan.num_core_rows) == (10 * 32, 10 * 32)
    assert plan.num_freed_blocks(599) == 0


@pytest.mark.parametrize(
    ("ratio", "count", "expected"),
    [(0.7, 30, 21), (0.1, 30, 3), (0.5, 571, 286), (1.0, 7, 7), (0.3, 1, 1)],
    ids=["float-would-be-22", "exact-tenth", "half-up", "all", "at-least-one"],
)
def test_ratios_are_decimals(ratio, count, expected):
    assert ceil_ratio(ratio, count) == expected


@pytest.mark.parametrize(
    ("num_tokens", "ranges", "ratio"),
    [(600, [(5, 581)], 1.0), (31, [(2, 30)], 0.5), (64, [(0, 4)], 0.5), (40, [], 0.5)],
    ids=["all-stored", "no-full-block", "less-than-a-block", "no-vision"],
)
def test_nothing_to_free_is_no_plan(num_tokens, ranges, ratio):
    assert plan_of(num_tokens, ranges, 32, ratio) is None


@pytest.mark.parametrize(
    ("ranges", "policy", "expected"),
    [
        ([(5, 300)], "avl", 64),
        ([(5, 300)], "snapkv", 64),
        ([(5, 300), (580, 590)], "avl", 10),
        ([(5, 300), (580, 590)], "snapkv", 20),
        ([(5, 600)], "avl", 1),
    ],
    ids=["text", "any", "text-behind", "any-from-the-last-picture", "no-text-behind"],
)
def test_window_reaches_back_to_the_last_picture_at_most(ranges, policy, expected):
    plan = plan_of(600, ranges, 32, 0.5, 64, policy=policy)
    assert plan.num_scoring_rows == expected


def test_hits_leave_the_scoring_rows_to_compute():
    plan = plan_of(640, [(0, 540)], 32, 0.05, 100)
    assert plan.num_scoring_rows == plan.last_chunk == 100
    assert plan.max_hit_tokens == 540 // 32 * 32


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(640, 608), (641, 608), (642, 640), (671, 640)]
)
def test_hits_reach_over_what_is_copied_and_leave_two_tokens(num_tokens, expected):
    plan = plan_of(num_tokens, [(0, 540)], 32, 0.05)
    assert plan.last_chunk == 2
    assert plan.max_hit_tokens == expected


prompts = st.builds(
    lambda gaps: gaps,
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 400)), min_size=1, max_size=5
    ),
)


@settings(deadline=None)
@given(
    gaps=prompts,
    tail=st.integers(1, 200),
    block_size=st.sampled_from([16, 32, 128]),
    ratio=st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.99, 1.0]),
    window=st.integers(1, 64),
)
def test_definition(gaps, tail, block_size, ratio, window):
    ranges, position = [], 0
    for text, vision in gaps:
        ranges.append((position + text, position + text + vision))
        position += text + vision
    plan = plan_of(position + tail, ranges, block_size, ratio, window)
    if plan is None:
        return
    full = plan.num_full_blocks * block_size
    vision = sum(
        max(0, min(end, full) - start) for start, end in ranges if start < full
    )
    text = full - vision
    assert plan.num_vision_tokens == vision
    assert 0 < plan.num_stored_blocks < plan.num_full_blocks
    assert plan.num_stored_vision + text == plan.num_stored_blocks * block_size
    extra = plan.num_stored_vision - ceil_ratio(ratio, vision)
    assert 0 <= extra < block_size
    assert plan.first_stored_block == plan.num_full_blocks - plan.num_stored_blocks > 0
    assert plan.moves_rows
    left = plan.num_prompt_tokens - plan.max_hit_tokens
    assert plan.max_hit_tokens % block_size == 0
    assert 0 <= left - plan.last_chunk < block_size
    assert plan.last_chunk == max(2, plan.num_scoring_rows)


@settings(deadline=None)
@given(
    window=st.integers(1, 40),
    budgets=st.lists(st.integers(40, 700), min_size=200, max_size=200),
    start_blocks=st.integers(0, 6),
)
def test_chunks_end_at_the_prompt_and_hold_the_scoring_rows(
    window, budgets, start_blocks
):
    plan = plan_of(617, [(5, 581)], 32, 0.5, window)
    computed = min(start_blocks * 32, plan.max_hit_tokens)
    for budget in budgets:
        wanted = min(budget, 700 - computed)
        new = limit_chunk(plan, computed, wanted)
        assert 0 < new <= wanted
        if computed < 617:
            assert computed + new <= 617
            if computed + new == 617:
                assert new >= max(2, plan.num_scoring_rows)
                return
        computed += new
    pytest.fail("the prompt never ended")


def test_a_lone_last_token_waits_for_its_neighbour():
    plan = plan_of(600, [(5, 581)], 32, 0.5)
    assert limit_chunk(plan, 0, 599) == 598
    assert limit_chunk(plan, 598, 1) == 0
    assert limit_chunk(plan, 598, 9) == 2
    assert limit_chunk(plan, 600, 7) == 7
