"""What a step's attention reads of each row, and who has work after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_avl.worker.request import Task
from vllm_avl.worker.step import StepRows


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


def stored_table_on_cpu(
    rows: StepRows, block_table: torch.Tensor, block_size: int, width: int
) -> torch.Tensor:
    """As `stored_table`, of the first `width` columns, without padding rows.

    In NumPy: a call of torch costs more than its work on so little data.
    """
    seats = rows.step.requests.seats
    per_block = rows.step.requests.block_size // block_size
    num_rows, stride = block_table.shape
    columns = np.arange(width)
    first = rows.first_block * per_block
    place = first[:, None] + columns
    if first.max(initial=0) + width > stride:
        np.minimum(place, stride - 1, out=place)
    place += np.arange(0, num_rows * stride, stride)[:, None]
    # None is out of bounds; unlike the default, this writes without a buffer.
    stored = block_table.numpy().ravel().take(place, mode="clip")
    num_private = rows.num_private * per_block
    most = min(int(num_private.max(initial=0)), width)
    private = seats.private.numpy()[:, : -(-most // per_block)].take(rows.seats, 0)
    if per_block > 1:
        parts = np.arange(per_block, dtype=np.int32)
        private = (private[:, :, None] * per_block + parts).reshape(num_rows, -1)
    is_private = columns[:most] < num_private[:, None]
    np.copyto(stored[:, :most], private[:, :most], where=is_private)
    return torch.from_numpy(stored)


def make_tasks(
    rows: StepRows,
    block_table: torch.Tensor,
    stored_blocks: torch.Tensor,
    query_starts: Sequence[int],
    block_size: int,
) -> list[Task]:
    """Say what Python has to do behind the layers' attention.

    Args:
        rows: of the step.
        block_table: [num_reqs, max_blocks] int32, the runner's.
        stored_blocks: [num_reqs, max_blocks] int32, see `stored_table`.
        query_starts: index of each row's first token, and of the last one's end.
        block_size: the kernel's.
    """
    if not rows.with_python:
        return []
    step = rows.step
    tasks: list[Task] = []
    manager_size = step.requests.block_size
    per_block = manager_size // block_size
    # Rows know of no draft before it is accepted: what scores is in front of all.
    num_tokens, ends = step.num_certain.tolist(), step.ends_prompt.tolist()
    num_behind = (step.num_drafts + step.num_behind).tolist()
    first_block, ages = step.of["first_block"].tolist(), step.ages.tolist()
    refreshes, attended = rows.refreshes.tolist(), rows.is_attended.tolist()
    for row, index in rows.with_python:
        state, length = step.state(index), num_tokens[index]
        first = first_block[index]
        num_blocks = -(-length // block_size)
        num_aged = 0
        if ages[index]:
            num_aged = state.plan.num_evicted_text_blocks(length)
            num_aged -= state.num_aged_blocks
        prompt, num_private = None, 0
        if ends[index]:
            if length != state.plan.num_prompt_tokens:
                raise RuntimeError("a chunk crossed its prompt's end")
            prompt = block_table[row, :num_blocks].contiguous()
            private = _private(state.compaction.block_ids, per_block, prompt)
            num_private = len(private)
            behind = prompt[state.plan.num_full_blocks * per_block :]
            table = torch.cat([private, behind]).unsqueeze(0)
            stored = table, 0, table.shape[1]
        else:
            stored = stored_blocks, row, num_blocks - first * per_block
        tasks.append(
            Task(
                state,
                query_starts[row + 1] - num_behind[index],
                length,
                stored,
                first * manager_size,
                refreshes[row],
                attended[row],
                num_aged * manager_size,
                prompt,
                num_private,
                step.is_drafter,
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
