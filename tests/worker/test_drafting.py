"""A step as a drafter's own layers repeat it."""

from types import SimpleNamespace

import numpy as np
import torch
from stepping import BLOCK_SIZE, PROMPT, Worker

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
    rows = ending_beside_another().rows(None)
    left = leave_scoring_rows(rows, common_of([1, 500], [51, 600]))
    assert left.query_start_loc.tolist() == [0, 1, 482, 501]
    assert left.seq_lens.tolist() == [51, 581, 19]
    assert left.max_query_len == 481


def test_what_a_draft_model_takes_in_besides_lies_behind_them():
    rows = ending_beside_another().repeated(1).rows(None)
    common = common_of([2, 501], [52, 601])
    left = leave_scoring_rows(rows, common)
    assert left.query_start_loc.tolist() == [0, 2, 483, 502, 503]
    assert left.seq_lens.tolist() == [52, 581, 19, 601]
    assert left.block_table_tensor[:, 0].tolist() == [0, 30, 30, 30]


def test_a_repeated_step_scores_by_the_same_tokens():
    step = ending_beside_another()
    table = torch.arange(60, dtype=torch.int32).view(2, 30)
    (task,) = make_tasks(step.rows(None), table, table, [0, 1, 501], BLOCK_SIZE)
    again = step.repeated(1)
    (repeated,) = make_tasks(again.rows(None), table, table, [0, 2, 503], BLOCK_SIZE)
    assert (task.query_end, task.num_tokens) == (501, PROMPT)
    assert (repeated.query_end, repeated.num_tokens) == (502, PROMPT)
    assert (task.is_drafter, repeated.is_drafter) == (False, True)
    shifted = step.repeated(0)
    (repeated,) = make_tasks(shifted.rows(None), table, table, [0, 1, 501], BLOCK_SIZE)
    assert repeated.query_end == 501
