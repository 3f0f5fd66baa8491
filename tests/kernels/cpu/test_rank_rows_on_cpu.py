"""The order of a prompt's rows, against the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_avl.kernels.cpu import rank_rows, reference

INF, NAN = float("inf"), float("nan")
SOME = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 1.0, -INF, INF, NAN])


def ranked(scores, core_scores, num_stored, num_core, num_fixed=0):
    """What both make of the same numbers; every second position is a candidate."""
    candidates = torch.arange(scores.shape[1]) * 2
    fixed = torch.arange(num_fixed) * 2 + 1
    asked = scores, core_scores, num_stored, num_core, candidates, fixed
    ours, expected = rank_rows(*asked), reference.rank_rows(*asked)
    assert ours.dtype == torch.int32
    assert ours.tolist() == expected.tolist()
    return ours.tolist()


@st.composite
def prompts(draw):
    num_rankings, size = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    row = st.lists(SOME, min_size=size, max_size=size)
    scores = core_scores = torch.tensor([draw(row) for _ in range(num_rankings)])
    if draw(st.booleans()):
        core_scores = torch.tensor([draw(row) for _ in range(num_rankings)])
    num_stored = draw(st.integers(0, size))
    return scores, core_scores, num_stored, draw(st.integers(0, num_stored))


@settings(deadline=None, max_examples=300)
@given(case=prompts(), num_fixed=st.integers(0, 3))
def test_the_order_is_that_of_two_sorts(case, num_fixed):
    ranked(*case, num_fixed)


@pytest.mark.parametrize("has_core", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_many_scores(has_core, num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    scores = torch.rand(5, 3000).pow(20)
    scores[2] = scores[2].mul(4).round()
    ranked(scores, scores, 1700, 1700 - has_core, 40)
    ranked(scores, torch.rand(5, 3000), 1700, 1700 - has_core)


def test_the_best_come_first_and_of_equals_the_lower_position():
    scores = torch.tensor([[1.0, 3.0, NAN, 3.0, INF, 0.0]])
    assert ranked(scores, scores, 6, 1) == [[8, 2, 6, 0, 10, 4]]


def test_without_core_what_stays_ascends():
    scores = torch.tensor([[1.0, 3.0, NAN, 3.0, INF, 0.0], [0, 0, 0, 0, 0, 1.0]])
    assert ranked(scores, scores, 3, 3, 1) == [[1, 2, 6, 8], [1, 0, 2, 10]]
    assert ranked(scores, scores, 0, 0) == [[], []]


def test_core_has_an_order_of_its_own_among_what_is_stored():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    core_scores = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    assert ranked(scores, core_scores, 3, 1) == [[4, 2, 0]]
