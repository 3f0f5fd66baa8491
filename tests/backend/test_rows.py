"""Rows of a layer: moves are applied to a simulated cache and looked at."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_avl.kernels import reference

from vllm_avl.backend.rows import CORE, EVICTED, SECONDARY, LayerRows, Moves, rearrange

BLOCK_SIZE = 4
NAN = float("nan")


@st.composite
def arrangements(draw):
    """Rows in any order, and labels of which each ranking has equally many."""
    num_rankings = draw(st.integers(1, 3))
    num_heads = num_rankings if num_rankings > 1 else draw(st.integers(1, 3))
    counts = [draw(st.integers(0, 9)) for _ in range(3)]
    labels = [EVICTED] * counts[0] + [SECONDARY] * counts[1] + [CORE] * counts[2]
    start = draw(st.integers(0, 9))
    permutations = st.permutations(range(len(labels)))
    orders = [draw(permutations) for _ in range(num_rankings)]
    positions = [[2 * p + 1 for p in draw(permutations)] for _ in range(num_rankings)]
    sums = None
    if draw(st.booleans()):
        shape = num_heads, len(labels)
        sums = torch.arange(1, 1 + shape[0] * shape[1]).float().view(shape)
    return (
        LayerRows(start, torch.tensor(positions).view(num_rankings, -1), sums),
        torch.tensor([[labels[i] for i in order] for order in orders]).view(
            num_rankings, -1
        ),
        start + counts[0],
        start + counts[0] + counts[1],
        num_heads,
    )


def cache_of(rows, num_heads):
    """Shuffled blocks whose rows say which position they hold; -1 is not ours."""
    num_blocks = -(-rows.end // BLOCK_SIZE)
    blocks = torch.randperm(num_blocks + 3)[:num_blocks]
    flat = torch.full((num_heads, num_blocks * BLOCK_SIZE), -1)
    flat[:, rows.start : rows.end] = rows.positions
    cache = torch.full((num_blocks + 3, num_heads, BLOCK_SIZE, 1), -1)
    cache[blocks] = flat.view(num_heads, -1, BLOCK_SIZE, 1).transpose(0, 1)
    return cache, blocks


def read(cache, blocks):
    return cache[blocks].transpose(0, 1).flatten(1)


def rearranged(case, padded=False):
    """Rows before, rows after, and what the simulated cache holds after the moves."""
    rows, labels, start, core_start, num_heads = case
    before = LayerRows(
        rows.start,
        rows.positions.clone(),
        None if rows.sums is None else rows.sums.clone(),
    )
    keys, blocks = cache_of(rows, num_heads)
    values = keys.clone()
    found = rearrange(rows, labels, start, core_start, padded=padded)
    for moves in found if not padded else map(unpadded, found):
        move = reference.exchange_rows if moves.exchange else reference.compact_blocks
        move(keys, values, blocks, moves.source, moves.target, moves.heads)
    assert torch.equal(keys, values)
    return before, rows, read(keys, blocks), found


def unpadded(moves):
    used = moves.source >= 0
    assert torch.equal(used, moves.target >= 0)
    heads = None if moves.heads is None else moves.heads[used]
    return Moves(moves.source[used], moves.target[used], heads, moves.exchange)


def pairs_of(moves):
    """`(ranking, source, target)` of each pair."""
    rankings = torch.zeros_like(moves.source) if moves.heads is None else moves.heads
    return list(
        zip(
            rankings.tolist(),
            moves.source.tolist(),
            moves.target.tolist(),
            strict=True,
        )
    )


@settings(deadline=None)
@given(case=arrangements())
def test_each_region_holds_the_rows_labelled_for_it(case):
    before, _, held, _ = rearranged(case)
    _, labels, start, core_start, _ = case
    for head, slots in enumerate(held[:, : before.end].tolist()):
        ranking = min(head, len(labels) - 1)
        was = list(
            zip(
                before.positions[ranking].tolist(),
                labels[ranking].tolist(),
                strict=True,
            )
        )
        for region, label in (
            (slots[start:core_start], SECONDARY),
            (slots[core_start:], CORE),
        ):
            assert Counter(region) == Counter(p for p, given in was if given == label)


@settings(deadline=None)
@given(case=arrangements())
def test_rows_know_where_everything_lies_afterwards(case):
    before, after, held, _ = rearranged(case)
    _, _, start, _, num_heads = case
    assert (after.start, after.end) == (start, before.end)
    expected = after.positions.expand(num_heads, -1)
    assert torch.equal(held[:, start : before.end], expected)


@settings(deadline=None)
@given(case=arrangements())
def test_sums_move_with_their_rows(case):
    before, after, _, _ = rearranged(case)
    if before.sums is None:
        assert after.sums is None
        return
    for head in range(len(before.sums)):
        ranking = min(head, len(before.positions) - 1)
        sum_of = dict(
            zip(
                before.positions[ranking].tolist(),
                before.sums[head].tolist(),
                strict=True,
            )
        )
        expected = [sum_of[p] for p in after.positions[ranking].tolist()]
        assert after.sums[head].tolist() == expected


@settings(deadline=None)
@given(case=arrangements())
def test_rows_in_their_region_stay(case):
    before, after, _, found = rearranged(case)
    _, labels, start, core_start, _ = case
    slots = torch.arange(start, before.end)
    kept = labels[:, start - before.start :]
    fits = torch.where(slots >= core_start, kept == CORE, kept == SECONDARY)
    assert torch.equal(
        after.positions[fits], before.positions[:, start - before.start :][fits]
    )
    assert all((moves.heads is None) == (len(labels) == 1) for moves in found)


@settings(deadline=None)
@given(case=arrangements())
def test_only_rows_out_of_place_move(case):
    before, _, _, found = rearranged(case)
    _, labels, start, core_start, _ = case
    labels = labels.clone()
    for moves in found:
        for ranking, old, new in pairs_of(moves):
            here = ranking, old - before.start
            there = ranking, new - before.start
            assert labels[here] == (CORE if new >= core_start else SECONDARY)
            assert labels[there] == (SECONDARY if moves.exchange else EVICTED)
            assert start <= new < before.end
            assert (new >= core_start) != (old >= core_start) or old < start
            assert not moves.exchange or old >= start, "the head may be shared"
            labels[here], labels[there] = labels[there].clone(), labels[here].clone()


@settings(deadline=None)
@given(case=arrangements())
def test_pairs_have_no_slot_in_common(case):
    _, _, _, found = rearranged(case)
    for moves in found:
        pairs = pairs_of(moves)
        slots = {(ranking, slot) for ranking, *pair in pairs for slot in pair}
        assert len(slots) == 2 * len(pairs) > 0


@settings(deadline=None)
@given(
    num_heads=st.integers(1, 3),
    start=st.sampled_from([0, 8]),
    num_secondary=st.sampled_from([0, 4, 12]),
    num_core=st.integers(4, 20),
    data=st.data(),
)
def test_a_block_of_evicted_text_costs_at_most_two_blocks_of_moves(
    num_heads, start, num_secondary, num_core, data
):
    num_slots = num_secondary + num_core
    labels = torch.full((num_heads, num_slots), CORE)
    labels[:, :num_secondary] = SECONDARY
    for head in range(num_heads):
        core = st.permutations(range(num_secondary, num_slots))
        labels[head, data.draw(core)[:BLOCK_SIZE]] = EVICTED
    rows = LayerRows(start, torch.arange(num_slots).repeat(num_heads, 1))
    start += BLOCK_SIZE
    case = rows, labels, start, start + num_secondary, num_heads
    _, after, held, found = rearranged(case)
    assert not any(moves.exchange for moves in found)
    num_moved = sum(len(moves.source) for moves in found)
    assert num_moved <= 2 * BLOCK_SIZE * num_heads
    assert after.start == start
    secondary = held[:, start : start + num_secondary].sort(1).values
    assert torch.equal(secondary, torch.arange(num_secondary).expand(num_heads, -1))


@settings(deadline=None)
@given(case=arrangements())
def test_rows_of_a_refresh_change_places(case):
    rows, labels, _, core_start, num_heads = case
    labels = labels.where(labels != EVICTED, SECONDARY)
    _, _, _, found = rearranged((rows, labels, rows.start, core_start, num_heads))
    assert len(found) <= 1
    assert all(moves.exchange for moves in found)


def test_rows_do_not_move_where_all_is_in_order():
    rows = LayerRows(8, torch.tensor([[7, 3, 5, 1]]))
    labels = torch.tensor([[SECONDARY, SECONDARY, CORE, CORE]])
    assert rearrange(rows, labels, 8, 10) == []
    assert rows.positions.tolist() == [[7, 3, 5, 1]]


def test_appended_rows_lie_at_their_positions_and_are_unscored():
    rows = LayerRows(2, torch.tensor([[1, 3], [0, 3]]), torch.ones(2, 2))
    rows.extend(6)
    assert rows.positions.tolist() == [[1, 3, 4, 5], [0, 3, 4, 5]]
    expected = torch.tensor([[1, 1, NAN, NAN]] * 2)
    torch.testing.assert_close(rows.sums, expected, equal_nan=True)
    assert rows.end == 6


def test_heads_that_share_an_order_have_sums_of_their_own():
    rows = LayerRows(0, torch.tensor([[0, 1]]), torch.ones(3, 2))
    rows.extend(3)
    assert rows.positions.tolist() == [[0, 1, 2]]
    assert rows.sums.shape == (3, 3)


def test_nothing_appended_changes_nothing():
    rows = LayerRows(2, torch.tensor([[1, 0]]))
    positions = rows.positions
    rows.extend(4)
    assert rows.positions is positions


def test_sums_fade_before_the_next_scoring_is_added():
    rows = LayerRows(0, torch.tensor([[0, 1]]), torch.tensor([[1.0, 4.0]]))
    rows.add(torch.tensor([[0.5, 0.25]]), 0.5)
    assert rows.sums.tolist() == [[1.0, 2.25]]


def test_the_first_scoring_of_an_appended_row_is_its_sum():
    rows = LayerRows(0, torch.tensor([[0]]), torch.tensor([[1.0]]))
    rows.extend(2)
    rows.add(torch.tensor([[0.5, 0.25]]), 1.0)
    assert rows.sums.tolist() == [[1.5, 0.25]]


@pytest.mark.parametrize("num_rankings", [1, 3])
def test_heads_are_split_once(num_rankings):
    rows = LayerRows(0, torch.arange(4).expand(num_rankings, -1))
    rows.split_heads(3)
    assert rows.positions.tolist() == [[0, 1, 2, 3]] * 3


def test_split_heads_are_rearranged_on_their_own():
    rows = LayerRows(0, torch.tensor([[0, 1]]))
    rows.split_heads(2)
    labels = torch.tensor([[CORE, SECONDARY], [SECONDARY, CORE]])
    rearrange(rows, labels, 0, 1)
    assert rows.positions.tolist() == [[1, 0], [0, 1]]


@settings(deadline=None)
@given(case=arrangements())
def test_padded_moves_are_the_same_and_of_a_length_known_before(case):
    rows, labels, start, core_start, num_heads = case
    sizes = start - rows.start, core_start - start, rows.end - core_start
    other = LayerRows(rows.start, rows.positions, rows.sums)
    _, after, held, found = rearranged(case)
    padded_case = other, labels, start, core_start, num_heads
    _, padded_after, padded_held, padded = rearranged(padded_case, padded=True)
    assert torch.equal(padded_after.positions, after.positions)
    assert torch.equal(padded_held[:, start:], held[:, start:])
    if after.sums is not None:
        assert torch.equal(padded_after.sums, after.sums)
    pairs = [pairs_of(moves) for moves in found]
    assert [p for p in map(pairs_of, map(unpadded, padded)) if p] == pairs
    for moves in padded:
        lists = moves.source, moves.target, moves.heads
        assert all(given is None or given.is_contiguous() for given in lists)
    lengths = {len(labels) * min(a, b) for a in sizes for b in sizes}
    assert {len(moves.source) for moves in padded} <= lengths
