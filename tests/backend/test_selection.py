"""The template around every policy, against the same in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_avl.backend.rows import CORE, EVICTED, SECONDARY, LayerRows
from vllm_avl.backend.selection import Candidates, label_aged_text
from vllm_avl.plan import TextWindow

INF, NAN = float("inf"), float("nan")


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
    some = st.sampled_from([-1.0, 0.0, 0.25, 1.0, INF, NAN])
    row = st.lists(some, min_size=len(positions), max_size=len(positions))
    scores = [draw(row) for _ in range(1 if shared else num_rankings)]
    core_scores = [draw(row) for _ in scores]
    num_evicted = draw(st.integers(0, num_held))
    num_secondary = draw(st.integers(0, num_held - num_evicted))
    return positions, slots, scores, num_evicted, core_scores, num_secondary


def rated(score):
    """No number is worse than any."""
    return -INF if score != score else score


def label_by_hand(positions, slots, scores, num_evicted, core_scores, num_secondary):
    labels = []
    for ranking, row in enumerate(slots):
        group = ranking % len(scores)
        score_of = dict(zip(positions, map(rated, scores[group]), strict=True))
        core_score_of = dict(
            zip(positions, map(rated, core_scores[group]), strict=True)
        )
        held = [position for position in row if position in score_of]
        worst_first = sorted(held, key=lambda p: (score_of[p], -p))
        evicted, stored = worst_first[:num_evicted], worst_first[num_evicted:]
        secondary = sorted(stored, key=lambda p: (core_score_of[p], -p))[:num_secondary]
        label_of = dict.fromkeys(evicted, EVICTED) | dict.fromkeys(secondary, SECONDARY)
        labels.append([label_of.get(position, CORE) for position in row])
    return labels


def candidates_of(positions, slots):
    rows = LayerRows(0, torch.tensor(slots, dtype=torch.int64).view(len(slots), -1))
    return Candidates(torch.tensor(positions), rows, max(positions) + 1)


@settings(deadline=None)
@given(case=rankings())
def test_labels_equal_a_sort_by_score_and_position(case):
    positions, slots, scores, num_evicted, core_scores, num_secondary = case
    labels = candidates_of(positions, slots).label(
        torch.tensor(scores), num_evicted, torch.tensor(core_scores), num_secondary
    )
    assert labels.tolist() == label_by_hand(*case)


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
    labels = candidates_of([2, 4, 6, 8], [slots]).label(
        torch.zeros(1, 4), 1, torch.zeros(1, 4), 1
    )
    label_of = dict(zip(slots, labels[0].tolist(), strict=True))
    assert label_of == {2: CORE, 4: CORE, 6: SECONDARY, 8: EVICTED}


def test_of_many_equal_scores_the_lower_positions_win():
    few = torch.arange(200).remainder(3).float().unsqueeze(0)
    labels = candidates_of(list(range(200)), [list(range(200))]).label(few, 50, few, 60)
    case = [list(range(200))], few.tolist(), 50, few.tolist(), 60
    assert labels.tolist() == label_by_hand(list(range(200)), *case)


def test_a_token_that_is_gone_takes_nobodys_place():
    scores = torch.tensor([[5.0, 1.0, 9.0, 2.0]])
    labels = candidates_of([0, 1, 2, 3], [[3, 1, 0, 7]]).label(scores, 0, scores, 1)
    assert labels.tolist() == [[CORE, SECONDARY, CORE, CORE]]


def test_heads_of_one_ranking_get_the_same_labels_in_their_own_slots():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    candidates = candidates_of([0, 1, 2], [[0, 1, 2], [2, 0, 1]])
    labels = candidates.label(scores, 1, scores, 1)
    assert labels.tolist() == [[EVICTED, SECONDARY, CORE], [CORE, EVICTED, SECONDARY]]


def test_heads_with_rankings_of_their_own_keep_what_they_look_at():
    scores = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    labels = candidates_of([0, 1], [[0, 1], [0, 1]]).label(scores, 1, None, 0)
    assert labels.tolist() == [[EVICTED, CORE], [CORE, EVICTED]]


def test_core_is_chosen_by_its_own_scores_of_what_is_stored():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    core_scores = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    labels = candidates_of([0, 1, 2, 3], [[0, 1, 2, 3]]).label(
        scores, 1, core_scores, 1
    )
    assert labels.tolist() == [[SECONDARY, CORE, CORE, EVICTED]]


def test_a_budget_below_what_is_protected_is_kept():
    protected = torch.full((1, 4), INF)
    labels = candidates_of([0, 1, 2, 3], [[0, 1, 2, 3]]).label(
        protected, 2, protected, 1
    )
    assert labels.tolist() == [[CORE, SECONDARY, EVICTED, EVICTED]]


@st.composite
def texts(draw):
    """Text and other rows of some heads, with equal sums and unscored ones."""
    num_heads, num_slots = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    first = draw(st.sampled_from([0, 60_000]))
    order = st.permutations(range(first, first + num_slots))
    positions = [draw(order) for _ in range(num_heads)]
    num_text = draw(st.integers(0, num_slots))
    text = [set(draw(order)[:num_text]) for _ in range(num_heads)]
    some = st.sampled_from([0.0, 0.25, 0.5, 3.0, NAN])
    row = st.lists(some, min_size=num_slots, max_size=num_slots)
    sums = [draw(row) for _ in range(num_heads)]
    window = TextWindow(
        draw(st.sampled_from([0.3, 0.5, 0.7])),
        draw(st.sampled_from([0.3, 0.7, 1.0])),
        draw(st.integers(0, 4)),
    )
    # More than are held: text that has left before counts too.
    num_counted = num_text + draw(st.integers(0, 10))
    num_left = max(num_text - window.num_recent(num_counted), 0)
    num_evicted = draw(st.integers(0, num_left))
    return positions, text, sums, window, num_counted, num_evicted


def leaving_by_hand(positions, text, sums, num_recent, num_evicted):
    """One head's positions that leave."""
    sum_of = dict(zip(positions, sums, strict=True))
    oldest_first = sorted(text)
    old = oldest_first[: max(len(oldest_first) - num_recent, 0)]
    scored = [p for p in old if sum_of[p] == sum_of[p]]
    unscored = [p for p in old if sum_of[p] != sum_of[p]]
    order = sorted(scored, key=lambda p: (sum_of[p], -p)) + unscored
    return set(order[:num_evicted])


@settings(deadline=None)
@given(case=texts())
def test_text_leaves_in_the_order_of_a_sort(case):
    positions, text, sums, window, num_text, num_evicted = case
    before = [[SECONDARY if p % 3 else CORE for p in row] for row in positions]
    labels = label_aged_text(
        LayerRows(0, torch.tensor(positions), torch.tensor(sums)),
        torch.tensor(before),
        torch.tensor(
            [
                [p in mine for p in row]
                for row, mine in zip(positions, text, strict=True)
            ]
        ),
        window,
        num_text,
        num_evicted,
    )
    for head, row in enumerate(positions):
        leaving = leaving_by_hand(
            row, text[head], sums[head], window.num_recent(num_text), num_evicted
        )
        expected = [
            EVICTED if p in leaving else label
            for p, label in zip(row, before[head], strict=True)
        ]
        assert labels[head].tolist() == expected


def leaving(positions, sums, num_recent, num_evicted, is_text=None):
    """Positions of one head that leave, of a window with `num_recent` recent ones."""
    rows = LayerRows(0, torch.tensor([positions]), torch.tensor([sums]))
    labels = torch.full_like(rows.positions, CORE)
    text = labels == CORE if is_text is None else torch.tensor([is_text])
    window = TextWindow(1.0, 0.5, 0)
    assert window.num_recent(2 * num_recent) == num_recent
    labels = label_aged_text(rows, labels, text, window, 2 * num_recent, num_evicted)
    assert torch.equal(rows.sums, torch.tensor([sums])) or NAN in sums
    return sorted(rows.positions[labels == EVICTED].tolist())


def test_recent_text_never_leaves():
    assert leaving([0, 1, 2, 3], [9.0, 8.0, 0.0, 0.0], 2, 2) == [0, 1]


def test_of_equal_sums_the_lower_position_stays_in_any_slot():
    assert leaving([3, 0, 2, 1, 9], [1.0] * 5, 1, 2) == [2, 3]


def test_of_many_equal_sums_the_lower_positions_stay():
    assert leaving(list(range(200)), [1.0] * 200, 10, 50) == list(range(140, 190))


def test_unscored_text_leaves_behind_all_that_is_scored():
    sums = [NAN, 5.0, NAN, 900.0, 0.0]
    assert leaving([0, 1, 2, 3, 4], sums, 1, 2) == [1, 3]


def test_of_unscored_text_the_oldest_leaves_first():
    assert leaving([60_003, 60_001, 60_002, 60_004], [NAN] * 4, 1, 2) == [
        60_001,
        60_002,
    ]


def test_what_is_no_text_never_leaves():
    is_text = [False, True, False, True, True]
    assert leaving([0, 1, 2, 3, 4], [0.0] * 5, 1, 2, is_text) == [1, 3]
