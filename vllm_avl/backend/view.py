"""What a step's attention reads: shifted block tables, and the rows that compact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_avl.plan import Plan


@dataclass(frozen=True)
class Compaction:
    """One request whose prompt ends in this step."""

    plan: Plan
    query_end: int
    """Index in the step's tokens just behind the request's last prompt token."""
    blocks: torch.Tensor
    """[cdiv(num_prompt_tokens, block_size)] block ids of the prompt, int64."""
    vision_rows: torch.Tensor
    """[num_vision_tokens] prompt positions of the ranked vision tokens, int64."""


@dataclass(frozen=True)
class StepView:
    """The tensors a step's attention metadata is built from."""

    block_table: torch.Tensor
    """[num_reqs, max_blocks] int32."""
    seq_lens: torch.Tensor
    """[num_reqs] int32."""
    compactions: list[Compaction]


def make_view(
    row_plans: Sequence[tuple[int, Plan]],
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_size: int,
) -> StepView:
    """Shift every compacted request to its stored tail, and find who compacts now.

    The shift depends on the tokens computed before the step alone: the scheduler has
    given the head blocks away, and their ids in the table belong to others.

    Args:
        row_plans: batch rows that have a plan.
        block_table: [num_reqs, max_blocks], never written.
        seq_lens: [num_reqs] tokens at the end of the step, never written.
        query_start_loc: [num_reqs + 1] on the CPU.
        block_size: the kernel's block size, a divisor of the plans'.
    """
    shifted_table, shifted_lens = block_table, seq_lens
    compactions = []
    # Read whole: a look at one element of a tensor costs as much as all of them.
    query_starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for row, plan in row_plans:
        query_start, query_end = query_starts[row : row + 2]
        seq_len = lens[row]
        num_computed = seq_len - (query_end - query_start)
        if num_computed >= plan.num_prompt_tokens:
            if shifted_table is block_table:
                shifted_table, shifted_lens = block_table.clone(), seq_lens.clone()
            skip = plan.num_freed_tokens // block_size
            shifted_table[row, : block_table.shape[1] - skip] = block_table[row, skip:]
            shifted_lens[row] = seq_len - plan.num_freed_tokens
        elif seq_len >= plan.num_prompt_tokens:
            assert seq_len == plan.num_prompt_tokens, "a chunk crossed the prompt"
            compactions.append(
                _compaction(plan, query_end, block_table[row], block_size)
            )
    return StepView(shifted_table, shifted_lens, compactions)


def _compaction(
    plan: Plan, query_end: int, blocks: torch.Tensor, block_size: int
) -> Compaction:
    num_blocks = -(-plan.num_prompt_tokens // block_size)
    ranges = [torch.arange(start, end) for start, end in plan.vision_ranges]
    return Compaction(
        plan, query_end, blocks[:num_blocks].to(torch.int64), torch.cat(ranges)
    )
