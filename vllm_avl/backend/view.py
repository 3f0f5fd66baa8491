"""What a step's attention reads: shifted block tables, and who has work for later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_avl.backend.request import RequestState, Task


@dataclass(frozen=True)
class StepView:
    """The tensors a step's attention metadata is built from."""

    block_table: torch.Tensor
    """[num_reqs, max_blocks] int32."""
    seq_lens: torch.Tensor
    """[num_reqs] int32."""
    tasks: list[Task]


def make_view(
    row_states: Sequence[tuple[int, RequestState]],
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_size: int,
) -> StepView:
    """Shift every adaptive request to the tail it reads, and find who has work.

    The shift depends on the tokens computed before the step alone: the scheduler has
    given the blocks in front of it away, and their ids in the table belong to others.

    Args:
        row_states: batch rows that are adaptive.
        block_table: [num_reqs, max_blocks], never written.
        seq_lens: [num_reqs] tokens at the end of the step, never written.
        query_start_loc: [num_reqs + 1] on the CPU.
        block_size: the kernel's block size, a divisor of the plans'.
    """
    shifted_table, shifted_lens = block_table.clone(), seq_lens.clone()
    tasks = []
    # Read whole: a look at one element of a tensor costs as much as all of them.
    query_starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for row, state in row_states:
        query_start, query_end = query_starts[row : row + 2]
        num_tokens = lens[row]
        plan, num_computed = state.plan, num_tokens - (query_end - query_start)
        if num_tokens < plan.num_prompt_tokens:
            continue
        num_blocks = -(-num_tokens // block_size)
        blocks = block_table[row, :num_blocks]
        task = Task(state, query_start, query_end, num_computed, num_tokens, blocks)
        state.record(num_tokens, task.scores)
        if task.has_work:
            tasks.append(task)
        if task.compacts:
            assert num_tokens == plan.num_prompt_tokens, "a chunk crossed the prompt"
            continue
        skip = task.first_read_token // block_size
        if task.scores_while_attending:
            # Attended by `scored_attention`; the kernel is given one key, not all.
            skip = num_blocks - 1
        shifted_table[row, : num_blocks - skip] = blocks[skip:]
        shifted_lens[row] = (
            1 if task.scores_while_attending else num_tokens - skip * block_size
        )
    return StepView(shifted_table, shifted_lens, tasks)
