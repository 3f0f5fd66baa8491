"""Which rows our CUDA kernel attends, and what it is told of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stepping import CORE, CUDA_KERNELS, PROMPT, TEXT, Worker, plan_of

from vllm_avl.worker.cuda.core_lists import NUM_NUMBERS, CoreLists
from vllm_avl.worker.cuda.listed_rows import (
    num_splits,
    select,
    some_rows,
    whole_step,
)
from vllm_avl.worker.request import Kernels

STORED, LISTED = 10 * 32, 4 * 32
"""Rows of full prompt blocks that `CORE` stores and reads."""
NOTHING = [0] * NUM_NUMBERS


def worker_of(*names, kernels=CUDA_KERNELS, **settings):
    """A worker of requests whose core has been chosen."""
    worker = Worker(kernels)
    for name in names:
        worker.give(name, **CORE | settings)
        state = worker.requests.running[name]
        state.masks(state.plan.num_stored_rows)
    return worker


def selected(worker, *spans):
    """What each row of a step reads."""
    rows = worker.begin(*spans).rows()
    return select(rows, rows.is_attended).T.tolist()


def test_an_ordinary_row_reads_its_list_and_what_lies_behind_those_slots():
    worker = worker_of("r")
    expected = [STORED, LISTED, 0, STORED, 0]
    assert selected(worker, ("r", PROMPT, 1)) == [expected]
    assert selected(worker, ("r", PROMPT + 40, 1)) == [expected]


def test_a_refresh_reads_and_scores_all_that_is_stored_and_chooses_from_it():
    worker = worker_of("r")
    span = "r", PROMPT + 2, 1
    assert selected(worker, span) == [[0, 0, 1, STORED, LISTED]]
    assert not worker.begin(span).has_work


CHOSEN_BY_PYTHON = [
    {"policy": "h2o"},
    {"policy": "random"},
    {"refresh_all_ranks": True},
    {"head_reduction": "max"},
    {"text_keep_ratio": 0.5},
]


@pytest.mark.parametrize("settings", CHOSEN_BY_PYTHON, ids=lambda s: next(iter(s)))
def test_what_kernels_cannot_choose_is_work_for_python(settings):
    worker = worker_of("r", **settings)
    span = "r", PROMPT + 2, 1
    assert selected(worker, span) == [[0, 0, 1, STORED, 0]]
    assert worker.begin(span).has_work
    assert not worker.requests.running["r"].core_in_pass


def test_kernels_that_cannot_choose_leave_it_to_python():
    worker = worker_of("r", kernels=Kernels(num_lists=1))
    assert selected(worker, ("r", PROMPT + 2, 1)) == [[0, 0, 1, STORED, 0]]


@pytest.mark.parametrize("policy", ["fastv", "snapkv", "streaming"])
def test_a_policy_that_never_refreshes_reads_all_and_scores_nothing(policy):
    worker = worker_of("r", policy=policy)
    assert selected(worker, ("r", PROMPT + 2, 1)) == [[0, 0, 0, STORED, 0]]
    assert selected(worker, ("r", PROMPT, 1)) == [[STORED, LISTED, 0, STORED, 0]]


@pytest.mark.parametrize(
    ("policy", "expected"), [("avl", True), ("random", False), ("fastv", False)]
)
def test_introspection_does_not_change_who_chooses(policy, expected):
    for introspection in (0, 4):
        worker = worker_of("r", policy=policy, introspection=introspection)
        assert worker.requests.running["r"].core_in_pass is expected


def test_a_replay_of_several_tokens_is_not_ours_to_attend():
    worker = worker_of("r")
    assert selected(worker, ("r", PROMPT, 5)) == [[0, 0, 0, 0, 0]]
    assert worker.begin(("r", PROMPT, 5)).has_work


@pytest.mark.parametrize("computed", [0, 590])
def test_a_prompt_is_not_ours_to_attend(computed):
    worker = worker_of("r")
    assert selected(worker, ("r", computed, PROMPT - computed)) == [NOTHING]


def test_slots_that_text_has_left_are_listed_no_more():
    worker = worker_of("r", **TEXT)
    state = worker.requests.running["r"]
    # A refresh at 650 tokens, behind the first block of text that left.
    state.masks(650 - 9 * 32)
    (row,) = selected(worker, ("r", 652, 1))
    slots = 650 - 9 * 32
    assert row == [slots, slots - 6 * 32, 0, slots, 0]


def lists_of(num_lists=1):
    return CoreLists(
        num_slots=4096,
        num_heads=4,
        num_kv_heads=2,
        num_lists=num_lists,
        max_num_seqs=4,
        num_entered=torch.zeros(1, dtype=torch.int32),
        layer_names=["a", "b"],
    )


def common_of(*query_lens, num_padded=0):
    lens = [*query_lens, *[0] * num_padded]
    starts = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=len(lens),
        max_query_len=max(lens),
        block_table_tensor=torch.arange(32, dtype=torch.int32).view(4, 8),
        seq_lens=torch.tensor([700, 710, 720, 730], dtype=torch.int32)[: len(lens)],
        query_start_loc=starts,
        query_start_loc_cpu=starts,
    )


def test_a_step_of_decode_rows_is_attended_whole_from_buffers_that_stay():
    worker, ours = worker_of("r"), lists_of()
    rows = worker.begin(("stock", 50, 1), ("r", PROMPT, 1)).rows()
    common = common_of(1, 1, num_padded=1)
    whole = whole_step(ours, common, rows, rows.is_attended, 1)
    assert whole.tokens is None
    ordinary = [STORED, LISTED, 0, STORED, 0]
    assert whole.selections.T.tolist() == [NOTHING, ordinary, NOTHING]
    assert whole.selections.dtype == torch.int32
    assert whole.chooses, "one graph serves steps that choose and steps that do not"
    assert whole.selections.data_ptr() == ours.selections.data_ptr()
    assert whole.block_table.data_ptr() == common.block_table_tensor.data_ptr()
    assert whole.seq_lens.data_ptr() == common.seq_lens.data_ptr()
    nothing = whole_step(ours, common, None, np.zeros(0, np.bool_), 1)
    assert not ours.selections[:, :3].any()
    assert nothing.chooses


def test_rows_of_another_list_read_all_of_a_whole_step():
    worker = worker_of("r", "other")
    rows = worker.begin(("other", PROMPT, 1), ("r", PROMPT + 2, 1)).rows()
    found = rows.is_attended & np.array([False, True])
    whole = whole_step(lists_of(), common_of(1, 1), rows, found, 1)
    assert whole.selections.T.tolist() == [NOTHING, [0, 0, 1, STORED, LISTED]]


def test_of_a_mixed_step_only_rows_with_core_are_ours():
    worker = worker_of("r")
    worker.give("stored")
    spans = ("prompt", 0, 5), ("r", PROMPT + 2, 1), ("stored", PROMPT, 1)
    rows = worker.begin(*spans).rows()
    assert rows.is_attended.tolist() == [False, True, False]
    some = some_rows(lists_of(), common_of(5, 1, 1), rows, rows.is_attended, 1)
    assert some.tokens.tolist() == [5]
    assert some.seq_lens.tolist() == [710]
    assert some.query_start_loc.tolist() == [0, 1]
    assert some.block_table.tolist() == [list(range(8, 16))]
    assert some.selections.T.tolist() == [[0, 0, 1, STORED, LISTED]]
    assert some.chooses


def test_several_rows_of_a_mixed_step_are_found_where_they_lie():
    worker = worker_of("a", "b")
    spans = ("a", PROMPT, 1), ("prompt", 0, 7), ("b", PROMPT + 2, 1)
    rows = worker.begin(*spans).rows()
    some = some_rows(lists_of(), common_of(1, 7, 1), rows, rows.is_attended, 1)
    assert some.tokens.tolist() == [0, 8]
    assert some.seq_lens.tolist() == [700, 720]
    assert some.query_start_loc.tolist() == [0, 1, 2]
    assert some.block_table[:, 0].tolist() == [0, 16]
    ordinary = [STORED, LISTED, 0, STORED, 0]
    assert some.selections.T.tolist() == [ordinary, [0, 0, 1, STORED, LISTED]]


def drafting(worker, **spans):
    """A step of requests with so many tokens, all but the first of them drafts."""
    computed = {name: first for name, (first, _) in spans.items()}
    lengths = {name: length for name, (_, length) in spans.items()}
    drafts = {name: length - 1 for name, length in lengths.items() if length > 1}
    return worker.requests.begin(computed, lengths, lambda: list(spans), drafts).rows()


def test_drafts_read_what_the_token_in_front_of_them_does_and_do_not_score():
    worker = worker_of("a", "b", "c")
    spans = {"a": (PROMPT, 4), "b": (PROMPT + 2, 3), "c": (PROMPT + 2, 1)}
    rows = drafting(worker, **spans)
    whole = whole_step(lists_of(), common_of(4, 3, 1), rows, rows.is_attended, 4)
    assert whole.max_query_len == 4
    assert whole.tokens is None
    assert whole.query_start_loc.tolist() == [0, 4, 7, 8]
    assert whole.selections.T.tolist() == [
        [STORED, LISTED, 0, STORED, 0],
        [0, 0, 3, STORED, LISTED],
        [0, 0, 1, STORED, LISTED],
    ]
    assert not rows.step.has_work


def test_drafts_in_a_mixed_step_are_found_behind_their_token():
    worker = worker_of("a", "b")
    spans = {"a": (PROMPT, 3), "prompt": (0, 7), "b": (PROMPT + 2, 2)}
    rows = drafting(worker, **spans)
    some = some_rows(lists_of(), common_of(3, 7, 2), rows, rows.is_attended, 4)
    assert some.tokens.tolist() == [0, 1, 2, 10, 11]
    assert some.query_start_loc.tolist() == [0, 3, 5]
    assert some.query_start_loc.dtype == torch.int32
    assert some.seq_lens.tolist() == [700, 720]
    assert some.max_query_len == 4
    ordinary = [STORED, LISTED, 0, STORED, 0]
    assert some.selections.T.tolist() == [ordinary, [0, 0, 2, STORED, LISTED]]


def test_a_mixed_step_that_chooses_nothing_launches_no_choice():
    worker = worker_of("r")
    for span, chooses in ((("r", PROMPT, 1), False), (("r", PROMPT + 2, 1), True)):
        rows = worker.begin(("prompt", 0, 5), span).rows()
        some = some_rows(lists_of(), common_of(5, 1), rows, rows.is_attended, 1)
        assert some.chooses is chooses


def test_a_choice_of_others_launches_none():
    worker = worker_of("r")
    worker.give("h2o", **CORE, policy="h2o")
    rows = worker.begin(("r", PROMPT + 2, 1), ("h2o", PROMPT + 2, 1)).rows()
    found = np.array([False, True])
    assert not some_rows(lists_of(), common_of(1, 1), rows, found, 1).chooses


@pytest.mark.parametrize(
    ("num_lists", "settings", "in_graph"),
    [
        (0, CORE, False),
        (1, CORE, True),
        (1, CORE | {"policy": "h2o"}, False),
        (1, CORE | TEXT, False),
        (2, CORE, True),
        (2, CORE | {"policy": "h2o"}, True),
        (2, CORE | TEXT, True),
        # What has no core reads all, in any graph.
        (0, {}, True),
        (0, TEXT, True),
    ],
    ids=str,
)
def test_whose_core_full_graphs_read(num_lists, settings, in_graph):
    worker = Worker(Kernels(choose_core=True, num_lists=num_lists))
    worker.give("r", plan_of(**settings))
    rows = worker.begin(("r", PROMPT, 1)).rows()
    assert rows.of["in_graph"].tolist() == [in_graph]
    assert rows.step.has_work is not in_graph


def test_layers_have_lists_of_their_own_and_share_scratch():
    ours = lists_of(2)
    for lists in (ours.core_list, ours.row_tokens):
        assert lists["a"].data_ptr() != lists["b"].data_ptr()
    assert ours.core_list["a"].shape == (2, 4096)
    assert ours.row_tokens["a"].shape == (4096,)
    assert ours.scores.shape == (2, 4096)
    assert ours.logits.shape == (4, 4096)
    assert ours.selections.shape == (NUM_NUMBERS, 4)


@pytest.mark.parametrize(("pairs", "splits"), [(1, 16), (32, 16), (64, 8), (1000, 1)])
def test_few_rows_are_split_over_more_programs(pairs, splits):
    assert num_splits(pairs) == splits
