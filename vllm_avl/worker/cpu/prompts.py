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
    left = np.zeros(common.num_reqs, np.int64)
    for row, index in rows.with_python:
        if rows.step.ends_prompt[index]:
            left[row] = rows.step.state(index).plan.num_scoring_rows
    source = np.repeat(np.arange(common.num_reqs), 1 + (left > 0))
    is_left = np.append(False, source[1:] == source[:-1])
    left = left[source]
    lengths = np.diff(common.query_start_loc_cpu.numpy())[source]
    seq_lens = common.seq_lens.numpy()[source]
    sizes = np.where(is_left, left, lengths - left)
    keys = np.where(is_left, left, seq_lens - left)
    exists = sizes > 0
    starts = torch.zeros(int(exists.sum()) + 1, dtype=torch.int32)
    starts[1:] = torch.from_numpy(np.cumsum(sizes[exists]))
    return common.replace(
        num_reqs=len(starts) - 1,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        max_query_len=int(sizes.max()),
        seq_lens=torch.from_numpy(keys[exists].astype(np.int32)),
        block_table_tensor=common.block_table_tensor[torch.from_numpy(source[exists])],
    )
