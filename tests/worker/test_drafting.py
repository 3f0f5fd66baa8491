"""Steps with drafts, and a step as a drafter's own layers repeat it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stepping import BLOCK_SIZE, CORE, PROMPT, TEXT, Worker

from vllm_avl.worker.cpu.backend import _attended
from vllm_avl.worker.cpu.prompts import leave_scoring_rows
from vllm_avl.worker.view import make_tasks


class Common(SimpleNamespace):
    """As much of vLLM's metadata as is looked at."""

    def replace(self, **changes):
        return Common(**(vars(self) | changes))


def common_of(lengths, seq_lens):
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    table = torch.arange(len(lengths) * 30, dtype=torch.int32)
    return Common(
        num_reqs=len(lengths),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        max_query_len=max(lengths),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table_tensor=table.view(len(lengths), 30),
    )


def ending_beside_another():
    """A step that ends a prompt of 600 tokens, 19 of which score; 100 came before."""
    worker = Worker()
    worker.give("r")
    return worker.begin(("stock", 50, 1), ("r", 100, PROMPT - 100))


def test_a_prompts_scoring_rows_attend_to_nothing_else():
    rows = ending_beside_another().rows()
    left = leave_scoring_rows(rows, common_of([1, 500], [51, 600]))
    assert left.query_start_loc.tolist() == [0, 1, 482, 501]
    assert left.seq_lens.tolist() == [51, 581, 19]
    assert left.max_query_len == 481


def test_what_a_draft_model_takes_in_besides_lies_behind_them():
    rows = ending_beside_another().repeated(1).rows()
    common = common_of([2, 501], [52, 601])
    left = leave_scoring_rows(rows, common)
    assert left.query_start_loc.tolist() == [0, 2, 483, 502, 503]
    assert left.seq_lens.tolist() == [52, 581, 19, 601]
    assert left.block_table_tensor[:, 0].tolist() == [0, 30, 30, 30]


def test_a_repeated_step_scores_by_the_same_tokens():
    step = ending_beside_another()
    table = torch.arange(60, dtype=torch.int32).view(2, 30)
    (task,) = make_tasks(step.rows(), table, table, [0, 1, 501], BLOCK_SIZE)
    again = step.repeated(1)
    (repeated,) = make_tasks(again.rows(), table, table, [0, 2, 503], BLOCK_SIZE)
    assert (task.query_end, task.num_tokens) == (501, PROMPT)
    assert (repeated.query_end, repeated.num_tokens) == (502, PROMPT)
    assert (task.is_drafter, repeated.is_drafter) == (False, True)
    shifted = step.repeated(0)
    (repeated,) = make_tasks(shifted.rows(), table, table, [0, 1, 501], BLOCK_SIZE)
    assert repeated.query_end == 501


def drafting(worker, num_computed, num_drafts, num_certain=1):
    """A step with drafts behind a request's certain tokens."""
    scheduled = {"r": num_certain + num_drafts}
    drafts = {"r": num_drafts} if num_drafts else {}
    return worker.requests.begin({"r": num_computed}, scheduled, lambda: ["r"], drafts)


@pytest.mark.parametrize(
    ("interval", "accepted", "refreshing"),
    [
        # First tokens of the steps: t = 1, 2, 3, ...
        (3, [0] * 9, [3, 6, 9]),
        # 1, 5, 9, 13: a multiple is passed over in each.
        (3, [3, 3, 3, 3], [5, 9, 13]),
        # 1, 2, 5, 6, 8, 9, 10.
        (3, [0, 2, 0, 1, 0, 0, 0], [5, 6, 9]),
        # 1, 4, 8, 10, 11, 12, 16, 17: once for each multiple of 8.
        (8, [2, 3, 1, 0, 0, 3, 0, 0], [8, 16]),
    ],
)
def test_a_refresh_is_due_once_a_multiple_is_passed(interval, accepted, refreshing):
    worker, num_computed, found = Worker(), PROMPT, []
    worker.give("r", **CORE | {"refresh_interval": interval})
    for count in accepted:
        step = drafting(worker, num_computed, 3)
        if step.refreshes[0]:
            found.append(num_computed - PROMPT + 1)
        assert step.refreshes[0] == step.reads_all[0]
        step.end()
        num_computed += 1 + count
    assert found == refreshing


def test_a_step_without_drafts_forgets_what_the_last_one_accepted():
    worker = Worker()
    worker.give("r", **CORE | {"refresh_interval": 4})
    drafting(worker, PROMPT, 3).end()
    # t = 4, 5 and 6: the first has not been passed before.
    steps = [drafting(worker, PROMPT + turn - 1, 0) for turn in (4,)]
    assert steps[0].refreshes[0]
    steps[0].end()
    for turn in (5, 6):
        step = drafting(worker, PROMPT + turn - 1, 0)
        assert not step.refreshes[0]
        step.end()


def test_a_replay_is_no_step_with_drafts():
    worker = Worker()
    worker.give("r", **CORE)
    assert not drafting(worker, PROMPT, 4).refreshes[0]
    assert drafting(worker, PROMPT, 0, num_certain=5).refreshes[0]


def test_a_step_with_drafts_scores_by_its_first_token():
    worker = Worker()
    worker.give("r", **CORE)
    step = drafting(worker, PROMPT + 2, 3)
    rows, table = step.rows(), torch.arange(30, dtype=torch.int32).view(1, 30)
    (task,) = make_tasks(rows, table, table, [0, 4], BLOCK_SIZE)
    assert (task.refreshes, task.attended) == (True, True)
    assert (task.last, task.query_end, task.num_tokens) == (0, 1, PROMPT + 3)
    starts, seq_lens = torch.tensor([0, 4]), np.array([300], np.int32)
    attended = _attended(rows, table, seq_lens, starts).rows
    assert attended.tokens.tolist() == [0, 1, 2, 3]
    assert attended.num_tokens.tolist() == [297, 298, 299, 300]
    assert attended.scored.tolist() == [True, False, False, False]


def test_a_replay_over_a_shared_prompt_scores_by_its_last_token():
    worker = Worker()
    worker.give("r", **CORE)
    records, seat = worker.requests.seats.records, worker.requests.running["r"].seat
    records["shares"][seat] = True
    rows = drafting(worker, PROMPT, 0, num_certain=4).rows()
    table = torch.arange(30, dtype=torch.int32).view(1, 30)
    starts, seq_lens = torch.tensor([0, 4]), np.array([300], np.int32)
    attended = _attended(rows, table, seq_lens, starts).rows
    assert attended.scored.tolist() == [False, False, False, True]


def test_text_ages_by_what_is_certain():
    worker = Worker()
    worker.give("r", **TEXT)
    state = worker.requests.running["r"]
    due = int(worker.requests.seats.records["next_aging"][state.seat])
    before = drafting(worker, due - 2, 3)
    assert not before.ages[0]
    before.end()
    assert state.num_aged_blocks == 0
    step = drafting(worker, due - 1, 3)
    table = torch.arange(60, dtype=torch.int32).view(1, 60)
    (task,) = make_tasks(step.rows(), table, table, [0, 4], BLOCK_SIZE)
    assert (task.num_aged, task.num_tokens) == (BLOCK_SIZE, due)
    step.end()
    assert state.num_aged_blocks == 1
    assert state.num_tokens == due + 3
    worker.requests.take_back({"r": 2})
    assert state.num_tokens == due + 1
