"""What a step reads, and who has work after it, on requests made by hand."""

import pytest
import torch

from vllm_avl.backend.request import RequestState
from vllm_avl.backend.view import make_view
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


def view_of(requests, block_size=BLOCK_SIZE):
    """View a step of `(state or None, tokens before, new tokens)` rows."""
    ids = torch.arange(1, 1 + 64 * len(requests), dtype=torch.int32)
    table = ids.flip(0).view(len(requests), 64).clone()
    lens = torch.tensor([old + new for _, old, new in requests], dtype=torch.int32)
    starts = torch.tensor([0, *(new for *_, new in requests)]).cumsum(0)
    rows = [(row, state) for row, (state, *_) in enumerate(requests) if state]
    view = make_view(rows, table, lens, starts, block_size)
    return table, view


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
def test_a_refresh_is_scored_elsewhere_and_costs_the_kernel_one_key(step):
    state = state_of(**CORE)
    table, view = view_of([(state, PROMPT + step - 1, 1)])
    assert read(view) == (own(table, 18, 19), 1)
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
    assert read(view) == (own(table, 18, 19), 1)
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
    assert read(view, 0, 16) == (own(table, 37, 38), 1)
    assert view.tasks[0].blocks.tolist() == own(table, 0, 38)


def test_the_runners_tensors_are_never_written():
    table = torch.arange(256, dtype=torch.int32).view(4, 64)
    lens = torch.tensor([601, 603, 620, 600], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 22, 622])
    untouched = [tensor.clone() for tensor in (table, lens, starts)]
    rows = [(row, state_of(**CORE)) for row in range(4)]
    view = make_view(rows, table, lens, starts, BLOCK_SIZE)
    for ours, theirs in zip((table, lens, starts), untouched, strict=True):
        assert torch.equal(ours, theirs)
    assert view.block_table.dtype == view.seq_lens.dtype == torch.int32


def test_requests_of_a_batch_keep_to_their_own_settings():
    batch = [
        (state_of(**CORE), PROMPT + 2, 1),
        (None, 700, 1),
        (state_of(), PROMPT + 2, 1),
        (state_of(**CORE), 100, 500),
        (state_of(**CORE | {"core_refresh_interval": 2}), PROMPT + 2, 1),
    ]
    table, view = view_of(batch)
    assert read(view, 0) == (own(table, 18, 19, 0), 1)
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
