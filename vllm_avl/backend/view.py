"""What a step's attention reads of each row, and who has work after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_avl.backend.request import Task
from vllm_avl.backend.step import StepRows


def stored_table(
    rows: StepRows,
    block_table: torch.Tensor,
    block_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Let every row of a block table be what its request has stored.

    The scheduler has given the prompts' blocks away, and their ids in the runner's
    table belong to others: what is read is [private | partial block | answer]. That
    depends on the tokens computed before the step alone.

    Args:
        rows: of the step.
        block_table: [num_reqs, max_blocks] int32, the runner's; rows behind those of
            the step are padding.
        block_size: the kernel's, a divisor of the block manager's.
        out: [num_reqs, max_blocks] int32, where to put the result.

    Returns:
        as block_table.
    """
    seats = rows.step.requests.seats
    per_block = rows.step.requests.block_size // block_size
    host = np.stack([rows.seats, rows.first_block, rows.num_private])
    host[1:] *= per_block
    num_rows = len(rows.index)
    device = block_table.device
    seat, first, num_private = torch.from_numpy(host).to(device, non_blocking=True)
    last = block_table.shape[1] - 1
    columns = torch.arange(last + 1, device=device)
    shifted = (columns + first.unsqueeze(1)).clamp_(max=last)
    if out is None:
        out = torch.empty_like(block_table)
    out[num_rows:] = block_table[num_rows:]
    table = torch.gather(block_table[:num_rows], 1, shifted, out=out[:num_rows])
    private = seats.private[seat]
    if per_block > 1:
        parts = torch.arange(per_block, dtype=torch.int32, device=device)
        private = (private.unsqueeze(-1) * per_block + parts).flatten(1)
    width = min(private.shape[1], last + 1)
    is_private = columns[:width] < num_private.unsqueeze(1)
    table[:, :width] = torch.where(is_private, private[:, :width], table[:, :width])
    return out


def make_tasks(
    rows: StepRows,
    block_table: torch.Tensor,
    stored: torch.Tensor,
    query_starts: Sequence[int],
    block_size: int,
) -> list[Task]:
    """Say what Python has to do behind the layers' attention.

    Args:
        rows: of the step.
        block_table: [num_reqs, max_blocks] int32, the runner's.
        stored: [num_reqs, max_blocks] int32, see `stored_table`.
        query_starts: index of each row's first token, and of the last one's end.
        block_size: the kernel's.
    """
    step, tasks = rows.step, []
    per_block = step.requests.block_size // block_size
    for row, index in rows.with_python:
        state, num_tokens = step.state(index), int(step.num_tokens[index])
        plan, ends = state.plan, bool(step.ends_prompt[index])
        if ends and num_tokens != plan.num_prompt_tokens:
            raise RuntimeError("a chunk crossed its prompt's end")
        first = int(step.of["first_block"][index])
        num_blocks = -(-num_tokens // block_size)
        gone = first - plan.first_stored_block
        num_aged = plan.num_evicted_text_blocks(num_tokens) - gone
        prompt, num_private = None, 0
        if ends:
            prompt = block_table[row, :num_blocks].contiguous()
            private = _private(state.compaction.block_ids, per_block, prompt)
            num_private = len(private)
            behind = prompt[plan.num_full_blocks * per_block :]
            blocks = torch.cat([private, behind])
        else:
            blocks = stored[row, : num_blocks - first * per_block].contiguous()
        tasks.append(
            Task(
                state,
                query_starts[row + 1],
                num_tokens,
                blocks,
                first * plan.block_size,
                scores=bool(rows.scores[row]),
                attended=bool(rows.is_attended[row]),
                num_aged=num_aged * plan.block_size,
                prompt=prompt,
                num_private=num_private,
            )
        )
    return tasks


def _private(
    block_ids: Sequence[int], per_block: int, like: torch.Tensor
) -> torch.Tensor:
    """[num_blocks] int32 blocks as the kernel counts them."""
    ids = np.asarray(block_ids, np.int32)[:, None] * per_block
    blocks = torch.from_numpy((ids + np.arange(per_block, dtype=np.int32)).ravel())
    return blocks.to(like.device, non_blocking=True)
