"""Text that has aged leaves, and the rows that fill its holes, against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_avl.kernels.cpu import reference

from vllm_avl.plan import TextWindow
from vllm_avl.worker.rows import LayerRows, Mask
from vllm_avl.worker.text import close_ranks, find_aged, move_mask

BLOCK_SIZE, HEAD_SIZE = 4, 1
NAN = float("nan")


@st.composite
def evictions(draw):
    """Rows of some heads in any order, and as many that leave as first slots go."""
    num_heads = draw(st.integers(1, 3))
    num_freed = BLOCK_SIZE * draw(st.integers(1, 2))
    num_slots = draw(st.integers(num_freed, 25))
    slots = range(num_slots)
    positions = [[2 * p + 1 for p in draw(st.permutations(slots))] for _ in "abc"]
    leaving = [set(draw(st.permutations(slots))[:num_freed]) for _ in "abc"]
    core = [draw(st.lists(st.booleans(), min_size=25, max_size=25)) for _ in "abc"]
    sums = None
    if draw(st.booleans()):
        sums = torch.arange(1.0, 1 + num_heads * num_slots).view(num_heads, -1)
    return (
        LayerRows(
            draw(st.integers(0, 9)), torch.tensor(positions[:num_heads]), sums=sums
        ),
        torch.tensor(
            [[slot in mine for slot in slots] for mine in leaving[:num_heads]]
        ),
        torch.tensor([row[:num_slots] for row in core[:num_heads]]),
        num_freed,
    )


def cache_of(positions):
    """Shuffled blocks whose keys and values say which position they hold."""
    num_heads, num_slots = positions.shape
    num_blocks = -(-num_slots // BLOCK_SIZE)
    blocks = torch.randperm(num_blocks + 3)[:num_blocks].to(torch.int32)
    cache = torch.full((num_blocks + 3, num_heads, 2, BLOCK_SIZE), -1.0)
    for half in reference.split(cache, HEAD_SIZE):
        for slot in range(num_slots):
            block, rest = blocks[slot // BLOCK_SIZE], slot % BLOCK_SIZE
            half[block, :, rest, 0] = positions[:, slot].float()
    return cache, blocks


def read(cache, blocks, num_slots):
    """[num_heads, num_slots] of the keys, which the values equal."""
    keys, values = reference.split(cache, HEAD_SIZE)
    assert torch.equal(keys, values)
    rows = keys[blocks.long()].transpose(0, 1).flatten(1)
    return rows[:, :num_slots].to(torch.int64)


@settings(deadline=None)
@given(case=evictions())
def test_survivors_are_where_they_are_said_to_be(case):
    rows, leaving, core, num_freed = case
    before, sums, start = rows.positions.clone(), rows.sums, rows.start
    cache, blocks = cache_of(before)
    moves = close_ranks(rows, leaving, num_freed)
    mask = move_mask(core, moves, num_freed)
    reference.copy_rows(cache, HEAD_SIZE, blocks, moves.source, blocks, moves.target)
    held = read(cache, blocks, before.shape[1])[:, num_freed:]
    assert torch.equal(held, rows.positions)
    assert rows.start == start + num_freed
    assert mask.shape == rows.positions.shape
    for head, was in enumerate(before.tolist()):
        survivors = {p for p, gone in zip(was, leaving[head], strict=True) if not gone}
        assert set(held[head].tolist()) == survivors
        assert len(survivors) == held.shape[1]
        slot_of = {p: slot for slot, p in enumerate(was)}
        slots = [slot_of[p] for p in rows.positions[head].tolist()]
        assert mask[head].tolist() == core[head, slots].tolist()
        if sums is not None:
            assert rows.sums[head].tolist() == sums[head, slots].tolist()
    assert (rows.sums is None) == (sums is None)


@settings(deadline=None)
@given(case=evictions())
def test_only_survivors_in_front_move_and_only_into_holes(case):
    rows, leaving, _, num_freed = case
    moves = close_ranks(rows, leaving, num_freed)
    assert moves.source.shape == moves.target.shape == (len(leaving), num_freed)
    assert moves.source.dtype == moves.target.dtype == torch.int32
    for slots in moves:
        assert slots.is_contiguous()
    for head, pairs in enumerate(zip(*map(torch.Tensor.tolist, moves), strict=True)):
        moved = [pair for pair in zip(*pairs, strict=True) if pair[0] != pair[1]]
        padding = [pair for pair in zip(*pairs, strict=True) if pair[0] == pair[1]]
        for old, new in moved:
            assert old < num_freed <= new
            assert not leaving[head, old]
            assert leaving[head, new]
        assert len({new for _, new in moved}) == len(moved)
        assert len(moved) == int((~leaving[head, :num_freed]).sum())
        # A slot that is read by nobody any more.
        assert all(slot < num_freed for slot, _ in padding)


def test_rows_of_one_head_keep_their_order_within_the_moves():
    rows = LayerRows(8, torch.arange(10).unsqueeze(0))
    leaving = torch.tensor(
        [[False, True, False, True, *[False] * 3, True, True, False]]
    )
    moves = close_ranks(rows, leaving, 4)
    assert moves.source.tolist() == [[0, 2, 0, 0]]
    assert moves.target.tolist() == [[7, 8, 0, 0]]
    assert rows.positions.tolist() == [[4, 5, 6, 0, 2, 9]]
    assert rows.start == 12


def test_what_was_there_before_is_not_written():
    positions = torch.arange(8).unsqueeze(0)
    rows = LayerRows(0, positions, sums=torch.arange(8.0).unsqueeze(0))
    sums, core = rows.sums, torch.ones(1, 8, dtype=torch.bool)
    leaving = torch.tensor([[False] * 4 + [True] * 4])
    moves = close_ranks(rows, leaving, 4)
    move_mask(core, moves, 4)
    assert positions.tolist() == [list(range(8))]
    assert sums.tolist() == [list(map(float, range(8)))]
    assert core.all()


# Rows between evictions.


def test_appended_rows_lie_at_their_positions_and_are_unscored():
    rows = LayerRows(2, torch.tensor([[1, 3], [0, 3]]), sums=torch.ones(2, 2))
    rows.extend(6)
    assert rows.positions.tolist() == [[1, 3, 4, 5], [0, 3, 4, 5]]
    expected = torch.tensor([[1, 1, NAN, NAN]] * 2)
    torch.testing.assert_close(rows.sums, expected, equal_nan=True)
    assert rows.num_slots == 4


def test_heads_that_share_an_order_have_sums_of_their_own():
    rows = LayerRows(0, torch.tensor([[0, 1]]), sums=torch.ones(3, 2))
    rows.extend(3)
    assert rows.positions.tolist() == [[0, 1, 2]]
    assert rows.sums.shape == (3, 3)


def test_nothing_appended_changes_nothing():
    rows = LayerRows(2, torch.tensor([[1, 0]]))
    positions = rows.positions
    rows.extend(4)
    assert rows.positions is positions


def test_scorings_add_up():
    rows = LayerRows(0, torch.tensor([[0, 1]]), sums=torch.tensor([[1.0, 4.0]]))
    rows.add(torch.tensor([[0.5, 0.25]]))
    assert rows.sums.tolist() == [[1.5, 4.25]]


def test_the_first_scoring_of_an_appended_row_is_its_sum():
    rows = LayerRows(0, torch.tensor([[0]]), sums=torch.tensor([[1.0]]))
    rows.extend(2)
    rows.add(torch.tensor([[0.5, 0.25]]))
    assert rows.sums.tolist() == [[1.5, 0.25]]


@pytest.mark.parametrize("num_rankings", [1, 3])
def test_heads_are_split_once(num_rankings):
    rows = LayerRows(0, torch.arange(4).expand(num_rankings, -1))
    rows.split_heads(3)
    assert rows.positions.tolist() == [[0, 1, 2, 3]] * 3


def test_what_was_appended_since_core_was_chosen_is_read():
    rows = LayerRows(4, torch.tensor([[9, 1, 2]]))
    assert rows.mask() is None
    rows.core = Mask(torch.tensor([[True, False, False]]))
    rows.extend(9)
    assert rows.mask().tolist() == [[True, False, False, True, True]]
    rows.split_heads(2)
    assert rows.mask().tolist() == [[True, False, False, True, True]] * 2


def test_rows_of_a_request_that_has_ended_keep_positions_and_core_alone():
    slots = torch.tensor([[True, False, False]])
    rows = LayerRows(4, torch.tensor([[9, 1, 2]]), Mask(slots), torch.ones(1, 3))
    rows.settle()
    slots.fill_(True)
    assert rows.mask().tolist() == [[True, False, False]]
    assert rows.sums is None
    assert rows.positions.tolist() == [[9, 1, 2]]
    assert rows.positions.dtype == torch.int32


# Which text leaves.


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
    is_text = [
        [p in mine for p in row] for row, mine in zip(positions, text, strict=True)
    ]
    found = find_aged(
        LayerRows(0, torch.tensor(positions), sums=torch.tensor(sums)),
        torch.tensor(is_text),
        window,
        num_text,
        num_evicted,
    )
    for head, row in enumerate(positions):
        expected = leaving_by_hand(
            row, text[head], sums[head], window.num_recent(num_text), num_evicted
        )
        marked = {p for p, goes in zip(row, found[head].tolist(), strict=True) if goes}
        assert marked == expected


def leaving(positions, sums, num_recent, num_evicted, is_text=None):
    """Positions of one head that leave, of a window with `num_recent` recent ones."""
    rows = LayerRows(0, torch.tensor([positions]), sums=torch.tensor([sums]))
    text = [True] * len(positions) if is_text is None else is_text
    window = TextWindow(1.0, 0.5, 0)
    assert window.num_recent(2 * num_recent) == num_recent
    found = find_aged(rows, torch.tensor([text]), window, 2 * num_recent, num_evicted)
    assert torch.equal(rows.sums, torch.tensor([sums])) or NAN in sums
    return sorted(rows.positions[found].tolist())


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
