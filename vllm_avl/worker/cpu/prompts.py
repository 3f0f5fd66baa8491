"""The last rows of prompts, which our kernel attends and scores in one pass."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_avl.worker.step import StepRows


def leave_scoring_rows(
    rows: StepRows, common: CommonAttentionMetadata
) -> CommonAttentionMetadata:
    """Leave the scoring rows of prompts that end in a step out of vLLM's attention.

    Its kernel writes every row of a step. So these become a sequence of their own
    that attends to nothing but its like, which costs next to nothing and is written
    over.

    Args:
        rows: of the step.
        common: of the step, on a CPU; nothing of it is written.
    """
    num_reqs = common.num_reqs
    left = np.zeros(num_reqs, np.int64)
    for row, index in rows.with_python:
        if rows.step.ends_prompt[index]:
            left[row] = rows.step.state(index).plan.num_scoring_rows
    lengths = np.diff(common.query_start_loc_cpu.numpy())
    seq_lens = common.seq_lens.numpy()
    behind = np.where(left > 0, rows.step.num_behind, 0)
    front = lengths - left - behind
    # What lies in front of the scoring rows, these, and what lies behind them.
    sizes = np.stack([front, left, behind], 1)
    keys = np.stack([seq_lens - left - behind, left, seq_lens], 1)
    exists = sizes > 0
    source = np.broadcast_to(np.arange(num_reqs)[:, None], sizes.shape)[exists]
    starts = torch.zeros(len(source) + 1, dtype=torch.int32)
    starts[1:] = torch.from_numpy(np.cumsum(sizes[exists]))
    return common.replace(
        num_reqs=len(source),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        max_query_len=int(sizes.max()),
        seq_lens=torch.from_numpy(keys[exists].astype(np.int32)),
        block_table_tensor=common.block_table_tensor[torch.from_numpy(source)],
    )
