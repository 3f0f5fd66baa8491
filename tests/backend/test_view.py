"""What a step reads, and who has work after it, on requests made by hand."""

from types import SimpleNamespace

import pytest
import torch

from vllm_avl.backend.request import RequestState, Turn
from vllm_avl.backend.view import make_view, shift
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan

BLOCK_SIZE = 32
PROMPT = 600
"""5 text, 576 vision, 19 text: 18 full blocks of 32 and 24 rows."""
START, CORE_START = 8, 14
"""First blocks of what `CORE` stores and of its core; `START` also without core."""
CORE = {"vision_core_ratio": 0.2, "core_refresh_interval": 3}
TEXT = {"text_keep_ratio": 0.5}


def state_of(**settings):
    return RequestState(
        make_plan(PROMPT, ((5, 581),), BLOCK_SIZE, AVLConfig(**settings))
    )


def view_of(requests, block_size=BLOCK_SIZE, fuses_scores=True):
    """View a step of `(state or None, tokens before, new tokens)` rows."""
    ids = torch.arange(1, 1 + 64 * len(requests), dtype=torch.int32)
    table = ids.flip(0).view(len(requests), 64).clone()
    lens = torch.tensor([old + new for _, old, new in requests], dtype=torch.int32)
    starts = torch.tensor([0, *(new for *_, new in requests)]).cumsum(0).tolist()
    turns = [state and Turn(state, old, old + new) for state, old, new in requests]
    untouched = table.clone(), lens.clone()
    view = make_view(turns, table, starts, block_size, fuses_scores)
    first = torch.tensor(view.first_blocks, dtype=torch.int32)
    shifted = shift(first, table, lens, block_size)
    assert torch.equal(untouched[0], table)
    assert torch.equal(untouched[1], lens)
    assert all(tensor.dtype == torch.int32 for tensor in shifted)
    return table, SimpleNamespace(
        block_table=shifted[0], seq_lens=shifted[1], tasks=view.tasks
    )


def read(view, row=0, block_size=BLOCK_SIZE):
    """Block ids that the kernel reads, and how many keys."""
    num_keys = int(view.seq_lens[row])
    return view.block_table[row, : -(-num_keys // block_size)].tolist(), num_keys


def own(table, first, end, row=0):
    return table[row, first:end].tolist()


@pytest.mark.parametrize("settings", [{}, CORE, CORE | TEXT], ids=["S", "SC", "SCT"])
def test_before_the_prompt_ends_nothing_is_shifted(settings):
    state = state_of(**settings)
    table, view = view_of([(state, 64, 500)])
    assert read(view) == (own(table, 0, 18), 564)
    assert view.tasks == []
    assert state.num_tokens == 0


@pytest.mark.parametrize("settings", [{}, CORE, CORE | TEXT], ids=["S", "SC", "SCT"])
@pytest.mark.parametrize("computed", [0, 598])
def test_the_compacting_step_reads_the_whole_prompt(settings, computed):
    state = state_of(**settings)
    table, view = view_of([(state, computed, PROMPT - computed)])
    assert read(view) == (own(table, 0, 19), PROMPT)
    (task,) = view.tasks
    assert task.compacts
    assert not task.scores
    assert task.state is state
    assert (state.num_tokens, state.num_refreshes) == (PROMPT, 0)


def test_a_chunk_across_the_prompts_end_is_ours_to_prevent():
    with pytest.raises(AssertionError, match="crossed"):
        view_of([(state_of(), 500, 101)])


def test_the_first_step_behind_the_prompt_does_not_compact_again():
    _, view = view_of([(state_of(**CORE), PROMPT, 1)])
    assert view.tasks == []


def test_without_core_every_step_reads_what_is_stored():
    for num_computed in range(PROMPT, PROMPT + 6):
        table, view = view_of([(state_of(), num_computed, 1)])
        assert read(view) == (own(table, START, 19), num_computed + 1 - START * 32)
        assert view.tasks == []


def test_an_ordinary_step_starts_at_core():
    for step in (1, 2, 4, 5):
        state = state_of(**CORE)
        table, view = view_of([(state, PROMPT + step - 1, 1)])
        assert read(view) == (own(table, CORE_START, 19), PROMPT + step - 14 * 32)
        assert view.tasks == []
        assert (state.num_tokens, state.num_refreshes) == (PROMPT + step, 0)


def test_a_step_into_a_new_block_reads_it():
    table, view = view_of([(state_of(**CORE), 640, 1)])
    assert read(view) == (own(table, CORE_START, 21), 641 - 14 * 32)


@pytest.mark.parametrize("step", [3, 6])
def test_a_refresh_is_scored_elsewhere_and_costs_the_kernel_one_block(step):
    state = state_of(**CORE)
    table, view = view_of([(state, PROMPT + step - 1, 1)])
    assert read(view) == (own(table, 18, 19), PROMPT + step - 18 * 32)
    (task,) = view.tasks
    assert task.scores
    assert task.scores_while_attending
    assert task.blocks.tolist() == own(table, 0, 19)
    assert task.blocks.dtype == torch.int64
    assert (state.num_tokens, state.num_refreshes) == (PROMPT + step, 1)


def test_a_policy_that_never_refreshes_reads_all_without_work():
    table, view = view_of([(state_of(policy="fastv", **CORE), PROMPT + 2, 1)])
    assert read(view) == (own(table, START, 19), 603 - START * 32)
    assert view.tasks == []


@pytest.mark.parametrize("computed", [PROMPT, PROMPT + 1])
def test_a_replay_reads_all_that_is_stored_and_scores_behind_the_kernel(computed):
    table, view = view_of([(state_of(**CORE), computed, 20)])
    assert read(view) == (own(table, START, 20), computed + 20 - START * 32)
    (task,) = view.tasks
    assert task.scores
    assert not task.scores_while_attending


def test_a_replay_without_core_has_no_work():
    _, view = view_of([(state_of(), PROMPT, 20)])
    assert view.tasks == []


@pytest.mark.parametrize(
    ("settings", "first"), [({}, START), (CORE, CORE_START)], ids=["stored", "core"]
)
def test_text_leaves_behind_the_step_and_the_next_one_starts_later(settings, first):
    # At 645 tokens a block's worth of text is outside of the window.
    settings = settings | TEXT | {"core_refresh_interval": 2}
    table, view = view_of([(state_of(**settings), 644, 1)])
    assert read(view) == (own(table, first, 21), 645 - first * 32)
    (task,) = view.tasks
    assert (task.num_aged, task.scores) == (BLOCK_SIZE, False)
    table, view = view_of([(state_of(**settings), 646, 1)])
    assert read(view) == (own(table, first + 1, 21), 647 - (first + 1) * 32)
    assert view.tasks == []


def test_text_may_leave_in_a_step_that_scores():
    _, view = view_of([(state_of(**CORE, **TEXT), 644, 1)])
    (task,) = view.tasks
    assert (task.num_aged, task.scores) == (BLOCK_SIZE, True)


def test_text_without_core_is_scored_at_the_interval():
    table, view = view_of([(state_of(**TEXT), PROMPT + 1, 1)])
    assert read(view) == (own(table, START, 19), PROMPT + 2 - START * 32)
    assert view.tasks == []
    table, view = view_of([(state_of(**TEXT), PROMPT + 2, 1)])
    assert read(view) == (own(table, 18, 19), PROMPT + 3 - 18 * 32)
    assert view.tasks[0].scores_while_attending


def test_a_long_question_ages_when_the_prompt_ends():
    plan = make_plan(700, ((5, 50),), BLOCK_SIZE, AVLConfig(text_keep_ratio=0.5))
    _, view = view_of([(RequestState(plan), 600, 100)])
    # 650 text tokens behind the image: 325 are too many, 10 blocks.
    assert view.tasks[0].num_aged == 10 * BLOCK_SIZE
    _, view = view_of([(RequestState(plan), 700, 1)])
    assert view.tasks == []


def test_the_kernels_blocks_may_be_smaller():
    state = state_of(**CORE)
    table, view = view_of([(state, PROMPT, 1)], 16)
    assert read(view, 0, 16) == (own(table, 2 * CORE_START, 38), 601 - 14 * 32)
    table, view = view_of([(state, PROMPT + 2, 1)], 16)
    assert read(view, 0, 16) == (own(table, 37, 38), 603 - 37 * 16)
    assert view.tasks[0].blocks.tolist() == own(table, 0, 38)


def test_a_back_end_without_fused_scores_reads_all_that_is_stored():
    state = state_of(**CORE)
    table, view = view_of([(state, PROMPT + 2, 1)], fuses_scores=False)
    assert read(view) == (own(table, START, 19), 603 - START * 32)
    (task,) = view.tasks
    assert task.scores
    assert not task.scores_while_attending


def test_tables_are_shifted_into_given_buffers():
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    lens = torch.tensor([12, 9], dtype=torch.int32)
    out = torch.empty_like(table), torch.empty_like(lens)
    first = torch.tensor([1, 0], dtype=torch.int32)
    shifted = shift(first, table, lens, 4, out)
    assert [one.data_ptr() for one in shifted] == [one.data_ptr() for one in out]
    assert out[0].tolist() == [[1, 2, 3, 3], [4, 5, 6, 7]]
    assert out[1].tolist() == [8, 9]


def test_requests_of_a_batch_keep_to_their_own_settings():
    batch = [
        (state_of(**CORE), PROMPT + 2, 1),
        (None, 700, 1),
        (state_of(), PROMPT + 2, 1),
        (state_of(**CORE), 100, 500),
        (state_of(**CORE | {"core_refresh_interval": 2}), PROMPT + 2, 1),
    ]
    table, view = view_of(batch)
    assert read(view, 0) == (own(table, 18, 19, 0), 603 - 18 * 32)
    assert read(view, 1) == (own(table, 0, 22, 1), 701)
    assert read(view, 2) == (own(table, START, 19, 2), 603 - START * 32)
    assert read(view, 3) == (own(table, 0, 19, 3), PROMPT)
    assert read(view, 4) == (own(table, CORE_START, 19, 4), 603 - CORE_START * 32)
    refresh, compacting = view.tasks
    assert refresh.state is batch[0][0]
    assert (refresh.query_start, refresh.query_end) == (0, 1)
    assert compacting.state is batch[3][0]
    assert (compacting.query_start, compacting.query_end) == (3, 503)
    assert (compacting.num_computed, compacting.num_tokens) == (100, PROMPT)
