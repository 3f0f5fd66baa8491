"""Core and the text window: the plan's counts against their definitions."""

import math
import pickle
from fractions import Fraction
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_avl import plan as plans
from vllm_avl.config import AVLConfig
from vllm_avl.plan import Compaction, TextWindow, make_plan

SIZES = [0.05, 0.3, 0.5, 0.7, 0.99, 1.0]


def plan_of(
    num_tokens=600, ranges=((5, 581),), block_size=32, max_num_tokens=None, **settings
):
    config = AVLConfig(**settings)
    return make_plan(
        num_tokens, ranges, block_size, config, max_num_tokens=max_num_tokens
    )


@pytest.mark.parametrize(
    ("ratio", "num_text", "expected"),
    [
        (0.7, 30, 21),
        (0.7, 45, 32),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.29, 50, 14),
        (0.7, 0, 0),
    ],
    ids=[
        "exact",
        "float-would-be-31",
        "half-down-to-even",
        "half-up-to-even",
        "hundredths",
        "none",
    ],
)
def test_window_is_a_decimal_rounded_half_to_even(ratio, num_text, expected):
    assert TextWindow(ratio, 0.7, 0).size(num_text) == expected


@pytest.mark.parametrize(
    ("num_text", "expected"), [(3, 20), (28, 20), (29, 20), (30, 21)]
)
def test_window_holds_a_minimum(num_text, expected):
    assert TextWindow(0.7, 0.7, 20).size(num_text) == expected


@pytest.mark.parametrize(
    ("heavy", "num_text", "expected"),
    [(0.7, 30, 6), (0.7, 64, 13), (0.5, 7, 3), (0.5, 14, 5), (1.0, 30, 0), (0.7, 3, 1)],
    ids=["15-heavy", "31.5-heavy", "2.5-heavy", "exact", "no-recent", "minimum"],
)
def test_recent_is_what_heavy_hitters_leave_of_the_window(heavy, num_text, expected):
    assert TextWindow(0.7, heavy, 4).num_recent(num_text) == expected


def blocks_evicted_step_by_step(plan, ratio, min_tokens, lengths):
    """The rule as the method states it, with a memory of what it has evicted."""
    vision = {p for start, end in plan.vision_ranges for p in range(start, end)}
    first, evicted = min(vision), 0
    for length in lengths:
        num_text = sum(p not in vision for p in range(first, length))
        window = max(round(Fraction(str(ratio)) * num_text), min_tokens)
        surplus = num_text - evicted * plan.block_size - window
        if surplus >= plan.block_size:
            evicted += surplus // plan.block_size
        yield evicted


@hypothesis_settings(deadline=None)
@given(
    ratio=st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.99]),
    min_tokens=st.integers(0, 40),
    block_size=st.sampled_from([1, 3, 8, 16]),
    ranges=st.sampled_from([((0, 9),), ((5, 30),), ((3, 8), (12, 40), (41, 42))]),
    num_question=st.integers(0, 70),
    chunks=st.lists(st.integers(1, 40), max_size=12),
    one_by_one=st.integers(0, 120),
)
def test_text_leaves_as_if_decided_step_by_step(
    ratio, min_tokens, block_size, ranges, num_question, chunks, one_by_one
):
    with patch.object(plans, "TEXT_MIN_TOKENS", min_tokens):
        end = ranges[-1][1] + num_question
        plan = plan_of(end, ranges, block_size, text_keep_ratio=ratio)
    lengths = [plan.num_prompt_tokens]
    for chunk in chunks + [1] * one_by_one:
        lengths.append(lengths[-1] + chunk)
    expected = list(blocks_evicted_step_by_step(plan, ratio, min_tokens, lengths))
    assert [plan.num_evicted_text_blocks(n) for n in lengths] == expected
    assert expected == sorted(expected)


@hypothesis_settings(deadline=None)
@given(max_num_tokens=st.integers(601, 800), min_tokens=st.integers(0, 40))
@example(max_num_tokens=645, min_tokens=20)
@example(max_num_tokens=644, min_tokens=20)
def test_there_is_a_window_where_the_answer_can_outgrow_it(max_num_tokens, min_tokens):
    with patch.object(plans, "TEXT_MIN_TOKENS", min_tokens):
        unlimited = plan_of(text_keep_ratio=0.5)
        plan = plan_of(max_num_tokens=max_num_tokens, text_keep_ratio=0.5)
    outgrown = unlimited.num_evicted_text_blocks(max_num_tokens) > 0
    assert (plan.text_window is not None) == outgrown


def test_without_a_window_no_text_leaves():
    assert plan_of().num_evicted_text_blocks(100_000) == 0


@hypothesis_settings(deadline=None)
@given(
    num_before=st.integers(0, 50),
    num_vision=st.integers(1, 400),
    num_behind=st.integers(1, 60),
    block_size=st.sampled_from([1, 4, 32]),
    store=st.sampled_from(SIZES),
    core=st.sampled_from(SIZES),
)
def test_vision_fills_the_blocks_that_its_ratio_needs(
    num_before, num_vision, num_behind, block_size, store, core
):
    core = min(core, store)
    end = num_before + num_vision
    plan = plan_of(
        end + num_behind,
        ((num_before, end),),
        block_size,
        store_ratio=store,
        core_ratio=core,
        text_keep_ratio=0.5,
    )
    full = plan.num_full_tokens
    vision = [p for p in range(num_before, end) if p < full]

    def filled(ratio):
        least = math.ceil(Fraction(str(ratio)) * len(vision))
        return least + -(full - len(vision) + least) % block_size

    assert plan.num_stored_vision == filled(store)
    assert plan.num_core_vision == filled(core)
    assert plan.has_core == (filled(core) < filled(store))


def test_an_ordinary_step_reads_core_and_a_refresh_what_is_stored():
    plan = plan_of(core_ratio=0.2)
    # 5 text + ceil(571 / 2) rows are 10 blocks, 5 + ceil(571 / 5) rows are 4, of 18.
    assert plan.num_freed_blocks(600) == 18 - 10
    assert plan.num_stored_rows == 10 * 32
    assert plan.num_core_rows == 4 * 32
    assert plan.num_secondary_rows == 6 * 32


def test_a_block_of_evicted_text_is_one_stored_block_less():
    plan = plan_of(core_ratio=0.2, text_keep_ratio=0.5)
    # 19 text tokens behind the image at 600; at 645 they are 64, and 32 are kept.
    assert [plan.num_freed_blocks(n) for n in (600, 644, 645)] == [8, 8, 9]
    # What refreshes alone read stays.
    assert plan.num_secondary_rows == 6 * 32


def test_nothing_is_freed_before_the_prompt_ends():
    plan = plan_of(700, ((5, 50),), text_keep_ratio=0.1)
    assert plan.num_freed_blocks(699) == 0
    # Of 650 text tokens 65 are kept: 585 are too many. No block of vision goes.
    assert plan.num_freed_blocks(700) == 585 // 32


def test_every_third_step_refreshes():
    plan = plan_of(core_ratio=0.2, refresh_interval=3)
    refreshing = [t for t in range(1, 10) if plan.refreshes(600 + t - 1, 1)]
    assert refreshing == [3, 6, 9]


def test_several_tokens_at_once_always_refresh():
    plan = plan_of(core_ratio=0.2, refresh_interval=5)
    assert all(plan.refreshes(num_computed, 2) for num_computed in range(600, 610))


@pytest.mark.parametrize("interval", [0, 1])
def test_text_is_scored_on_every_step_that_reads_all(interval):
    plan = plan_of(text_keep_ratio=0.7, refresh_interval=interval)
    assert all(plan.refreshes(num_computed, 1) for num_computed in range(600, 610))


def test_text_without_core_is_scored_at_the_interval():
    plan = plan_of(text_keep_ratio=0.7, refresh_interval=4)
    refreshing = [t for t in range(1, 10) if plan.refreshes(600 + t - 1, 1)]
    assert refreshing == [4, 8]


def test_without_core_and_text_window_nothing_refreshes():
    plan = plan_of(refresh_interval=1)
    assert not any(plan.refreshes(600, num_new) for num_new in (1, 2))


@pytest.mark.parametrize(
    ("interval", "has_core"), [(0, False), (1, False), (2, True), (3, True)]
)
def test_core_needs_steps_between_refreshes(interval, has_core):
    plan = plan_of(core_ratio=0.2, refresh_interval=interval)
    assert plan.has_core is has_core
    assert (plan.num_core_blocks < plan.num_stored_blocks) is has_core


STORE_ALL = {"store_ratio": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        STORE_ALL,
        STORE_ALL | {"core_ratio": 0.3, "refresh_interval": 0},
        STORE_ALL | {"core_ratio": 0.999},
        STORE_ALL | {"text_keep_ratio": 0.5, "max_num_tokens": 644},
    ],
    ids=["all-read", "core-never-used", "core-of-all-blocks", "short-answer"],
)
def test_nothing_saved_is_no_plan(settings):
    assert plan_of(**settings) is None


@pytest.mark.parametrize(
    "settings",
    [
        STORE_ALL | {"text_keep_ratio": 0.99},
        STORE_ALL | {"core_ratio": 0.3},
        {},
    ],
    ids=["text-only", "reads-only", "stored-only"],
)
def test_anything_saved_is_a_plan(settings):
    assert plan_of(**settings) is not None


def test_text_alone_keeps_the_prompts_blocks():
    plan = plan_of(text_keep_ratio=0.7, **STORE_ALL)
    assert plan.first_stored_block == plan.num_freed_blocks(600) == 0
    assert plan.num_stored_vision == plan.num_core_vision == plan.num_vision_tokens


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({}, True),
        (STORE_ALL | {"core_ratio": 0.3}, False),
        (STORE_ALL | {"core_ratio": 0.3, "text_keep_ratio": 0.5}, True),
        (STORE_ALL | {"text_keep_ratio": 0.5}, True),
    ],
    ids=["stored", "read", "read-text", "text"],
)
def test_rows_stay_in_the_prompts_blocks_where_all_is_stored_for_good(settings, moves):
    assert plan_of(**settings).moves_rows is moves


@pytest.mark.parametrize(("last_encoded", "expected"), [(590, 10), (None, 64)])
def test_scoring_rows_begin_at_the_last_encoded_input_at_most(last_encoded, expected):
    config = AVLConfig(observation_window=64)
    plan = make_plan(600, [(5, 500)], 32, config, last_encoded)
    assert plan.num_scoring_rows == expected


@pytest.mark.parametrize("text_keep_ratio", [0.7, 1.0])
def test_a_plan_survives_the_way_to_the_workers(text_keep_ratio):
    plan = plan_of(core_ratio=0.2, text_keep_ratio=text_keep_ratio)
    told = Compaction(plan, (7, 3, 9), in_place=True, num_copied=0)
    assert pickle.loads(pickle.dumps(told)) == told
