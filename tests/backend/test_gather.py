"""Which rows our CUDA kernel attends, and what it is told of them."""

from types import SimpleNamespace

import pytest
import torch

from vllm_avl.backend.gather import GatherBuffers, gathered_rows, num_splits
from vllm_avl.backend.request import RequestState, Turn
from vllm_avl.backend.view import Selection, select
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan

PROMPT = 600
"""5 text, 576 vision, 19 text: 18 full blocks of 32 and 24 rows."""
START = 8 * 32
NUM_CORE = 4 * 32
CORE = {"vision_core_ratio": 0.2, "core_refresh_interval": 3, "executor": "gather"}


def turn_of(num_computed, num_new=1, has_ranking_kernels=True, **settings):
    config = AVLConfig(**(CORE | settings))
    plan = make_plan(PROMPT, ((5, 581),), 32, config)
    state = RequestState(plan, has_ranking_kernels=has_ranking_kernels)
    return Turn(state, num_computed, num_computed + num_new)


def test_an_ordinary_row_reads_its_list_and_what_follows_the_full_blocks():
    assert select(turn_of(PROMPT)) == Selection(18 * 32, START, NUM_CORE)
    assert select(turn_of(PROMPT + 40)) == Selection(18 * 32, START, NUM_CORE)


def test_a_refresh_reads_and_scores_all_that_is_stored_and_chooses_from_it():
    turn = turn_of(PROMPT + 2)
    assert select(turn) == Selection(START, START, 0, True, 18 * 32, NUM_CORE)
    assert not turn.has_work


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "random"},
        {"introspection": 4},
        {"refresh_all_ranks": True},
        {"has_ranking_kernels": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_kernels_cannot_choose_is_work_for_python(settings):
    turn = turn_of(PROMPT + 2, **settings)
    assert select(turn) == Selection(START, START, 0, True, 18 * 32, 0)
    assert turn.has_work


def test_a_replay_of_several_tokens_is_work_for_python():
    assert turn_of(PROMPT, 5).has_work


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "h2o"},
        {"policy": "fastv"},
        {"head_reduction": "max"},
        {"text_keep_ratio": 0.5},
        {"vision_core_ratio": None},
        {"executor": "pack"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_has_no_list_is_read_from_its_first_block(settings):
    turn = turn_of(PROMPT, **settings)
    assert select(turn) == Selection(turn.first_read_token)
    assert not select(turn).gathers


@pytest.mark.parametrize(("num_computed", "num_new"), [(0, 32), (599, 1), (0, 600)])
def test_a_prompt_is_not_ours_to_attend(num_computed, num_new):
    assert not select(turn_of(num_computed, num_new)).gathers


def buffers():
    return GatherBuffers(
        num_slots=4096,
        num_heads=4,
        num_kv_heads=2,
        max_num_seqs=4,
        device=torch.device("cpu"),
        layer_names=["a", "b"],
    )


def step_of(query_lens, num_padded=0):
    lens = [*query_lens, *[0] * num_padded]
    return SimpleNamespace(
        num_reqs=len(lens),
        max_query_len=max(lens),
        block_table_tensor=torch.arange(32, dtype=torch.int32).view(4, 8),
        seq_lens=torch.tensor([700, 710, 720, 730], dtype=torch.int32)[: len(lens)],
        query_start_loc=torch.tensor([0, *lens], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        ),
    )


def test_a_step_of_decode_rows_is_attended_whole_from_buffers_that_stay():
    ours, common = buffers(), step_of([1, 1], num_padded=1)
    rows = gathered_rows(ours, common, [None, turn_of(PROMPT)])
    assert rows.tokens is None
    selections = [[0, 576, 0], [0, 256, 0], [0, 128, 0], *[[0] * 3] * 3]
    assert rows.selections.tolist() == selections
    assert rows.chooses, "one graph serves steps that choose and steps that do not"
    assert rows.selections.data_ptr() == ours.selections.data_ptr()
    assert rows.block_table.data_ptr() == common.block_table_tensor.data_ptr()
    gathered_rows(ours, common, [])
    assert not ours.selections[:, :3].any()


def test_of_a_mixed_step_only_rows_with_lists_are_ours():
    packed = turn_of(PROMPT, executor="pack")
    turns = [turn_of(0, 5), turn_of(PROMPT + 2), packed]
    rows = gathered_rows(buffers(), step_of([5, 1, 1]), turns)
    assert rows.tokens.tolist() == [5]
    assert rows.seq_lens.tolist() == [710]
    assert rows.query_start_loc.tolist() == [0, 1]
    assert rows.block_table.tolist() == [list(range(8, 16))]
    assert rows.selections.tolist() == [[256], [256], [0], [1], [576], [128]]
    assert rows.chooses


def test_a_mixed_step_that_chooses_nothing_launches_no_choice():
    rows = gathered_rows(buffers(), step_of([5, 1]), [turn_of(0, 5), turn_of(PROMPT)])
    assert not rows.chooses


def test_a_mixed_step_without_lists_is_left_to_vllm():
    turns = [turn_of(0, 5), turn_of(PROMPT, executor="pack")]
    assert gathered_rows(buffers(), step_of([5, 1]), turns) is None
    assert gathered_rows(buffers(), step_of([5, 1]), [None, None]) is None


def test_layers_have_lists_of_their_own():
    ours = buffers()
    a, b = ours.layers["a"], ours.layers["b"]
    assert a.core_list.data_ptr() != b.core_list.data_ptr()
    assert a.row_tokens.data_ptr() != b.row_tokens.data_ptr()


@pytest.mark.parametrize(("pairs", "splits"), [(1, 16), (32, 16), (64, 8), (1000, 1)])
def test_few_rows_are_split_over_more_programs(pairs, splits):
    assert num_splits(pairs) == splits
