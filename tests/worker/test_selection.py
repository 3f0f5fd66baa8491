"""The template around every policy, against the same in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_avl.worker.rows import LayerRows
from vllm_avl.worker.selection import (
    Candidates,
    best_slots,
    best_slots_on_cpu,
)

INF, NAN = float("inf"), float("nan")
SOME = st.sampled_from([-1.0, 0.0, 0.25, 1.0, INF, NAN])


@st.composite
def rankings(draw):
    """Candidates of which some are gone, among rows that do not compete."""
    positions = sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=12)))
    others = sorted(draw(st.sets(st.integers(0, 40), max_size=6)) - set(positions))
    num_held = draw(st.integers(0, len(positions)))
    num_rankings = draw(st.integers(1, 3))
    shared = draw(st.booleans())
    held = [draw(st.permutations(positions))[:num_held] for _ in range(num_rankings)]
    if shared:
        held = held[:1] * num_rankings
    slots = [draw(st.permutations(kept + others)) for kept in held]
    row = st.lists(SOME, min_size=len(positions), max_size=len(positions))
    scores = [draw(row) for _ in range(1 if shared else num_rankings)]
    return positions, slots, scores, draw(st.integers(0, num_held))


def rated(score):
    """No number is worse than any."""
    return -INF if score != score else score


def core_by_hand(positions, slots, scores, num_secondary):
    masks = []
    for ranking, row in enumerate(slots):
        score = scores[ranking % len(scores)]
        score_of = dict(zip(positions, map(rated, score), strict=True))
        held = [position for position in row if position in score_of]
        worst_first = sorted(held, key=lambda p: (score_of[p], -p))
        secondary = set(worst_first[:num_secondary])
        masks.append([position not in secondary for position in row])
    return masks


def candidates_of(positions, slots):
    rows = LayerRows(0, torch.tensor(slots, dtype=torch.int64).view(len(slots), -1))
    return Candidates(torch.tensor(positions), rows, max(positions) + 1)


def core_of(positions, slots, scores, num_secondary):
    by_slot = candidates_of(positions, slots).by_slot(torch.tensor(scores))
    where = torch.tensor(slots, dtype=torch.int64).view(len(slots), -1)
    competes = torch.isin(where, torch.tensor(positions))
    given = by_slot, where, competes, num_secondary
    core = best_slots(*given)
    assert torch.equal(best_slots_on_cpu(*given), core)
    return core.tolist()


@settings(deadline=None)
@given(case=rankings())
def test_core_is_what_a_sort_by_score_and_position_leaves(case):
    assert core_of(*case) == core_by_hand(*case)


@settings(deadline=None)
@given(case=rankings())
def test_held_is_what_a_slot_holds(case):
    positions, slots, *_ = case
    candidates = candidates_of(positions, slots)
    expected = [[position in row for position in positions] for row in slots]
    assert candidates.held.tolist() == expected
    assert candidates.num_rankings == len(slots)


@settings(deadline=None)
@given(case=rankings(), num_heads=st.integers(1, 3))
def test_values_come_into_the_candidates_order(case, num_heads):
    positions, slots, *_ = case
    if len(slots) > 1:
        num_heads = len(slots)
    values = torch.arange(1.0, 1 + num_heads * len(slots[0])).view(num_heads, -1)
    expected = []
    for head in range(num_heads):
        row = slots[head % len(slots)]
        value_of = dict(zip(row, values[head].tolist(), strict=True))
        expected.append([value_of.get(position, 0.0) for position in positions])
    assert candidates_of(positions, slots).by_position(values).tolist() == expected


@pytest.mark.parametrize("slots", [[2, 4, 6, 8], [8, 6, 4, 2], [6, 2, 8, 4]])
def test_of_equal_scores_the_lower_position_wins_in_any_slot(slots):
    (mask,) = core_of([2, 4, 6, 8], [slots], [[0.0] * 4], 2)
    assert dict(zip(slots, mask, strict=True)) == {2: True, 4: True, 6: False, 8: False}


def test_of_many_equal_scores_the_lower_positions_win():
    few = torch.arange(200).remainder(3).float().unsqueeze(0).tolist()
    case = list(range(200)), [list(range(200))], few, 110
    assert core_of(*case) == core_by_hand(*case)


def test_a_token_that_is_gone_takes_nobodys_place():
    scores = [[5.0, 1.0, 9.0, 2.0]]
    assert core_of([0, 1, 2, 3], [[3, 1, 0, 7]], scores, 1) == [
        [True, False, True, True]
    ]


def test_heads_of_one_ranking_get_the_same_core_in_their_own_slots():
    masks = core_of([0, 1, 2], [[0, 1, 2], [2, 0, 1]], [[1.0, 2.0, 3.0]], 1)
    assert masks == [[False, True, True], [True, False, True]]


def test_heads_with_rankings_of_their_own_read_what_they_look_at():
    masks = core_of([0, 1], [[0, 1], [0, 1]], [[1.0, 2.0], [2.0, 1.0]], 1)
    assert masks == [[False, True], [True, False]]


def test_a_budget_below_what_is_protected_is_kept():
    assert core_of([0, 1, 2, 3], [[0, 1, 2, 3]], [[INF] * 4], 3) == [
        [True, False, False, False]
    ]


def test_what_does_not_compete_is_read_always():
    masks = core_of([3, 4], [[9, 4, 0, 3, 5]], [[0.0, 1.0]], 2)
    assert masks == [[True, False, True, False, True]]
