"""What a step's attention reads of each row, and who has work after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_avl.backend.request import Task, Turn


class Selection(NamedTuple):
    """What one decode row reads, in slots of its request."""

    first_slot: int = 0
    """It reads all slots from here on."""
    list_start: int = 0
    """Where core's list begins: the first stored slot."""
    num_core: int = 0
    """Entries of the list that it reads."""
    scored: bool = False
    list_stop: int = 0
    """End of the slots that compete for core or are listed always."""
    num_chosen: int = 0
    """Entries of the list that is made of the step's scores; 0 where none is."""

    @property
    def gathers(self) -> bool:
        """Whether vLLM's kernel could not read this."""
        return self.num_core > 0 or self.scored


@dataclass(frozen=True)
class StepView:
    """Where the rows of a step begin to read."""

    first_blocks: list[int]
    """[num_rows] first block that vLLM's kernel reads."""
    tasks: list[Task]
    turns: Sequence[Turn | None]
    """[num_rows]; None where a row is not adaptive."""


def make_view(
    turns: Sequence[Turn | None],
    block_table: torch.Tensor,
    query_starts: Sequence[int],
    block_size: int,
    fuses_scores: bool,
) -> StepView:
    """Find where every row begins to read, and who has work.

    That depends on the tokens computed before the step alone: the scheduler has given
    the blocks in front of it away, and their ids in the table belong to others.

    Args:
        turns: of the batch's rows; None where a row is not adaptive.
        block_table: [num_reqs, max_blocks] int32.
        query_starts: index of each row's first token.
        block_size: the kernel's block size, a divisor of the plans'.
        fuses_scores: whether a lone decode row that scores is attended by our kernel.
    """
    first_blocks, tasks = [], []
    for row, turn in enumerate(turns):
        first_blocks.append(0)
        if turn is None or turn.is_prefix:
            continue
        num_blocks = -(-turn.num_tokens // block_size)
        alone = turn.num_new == 1
        fused = alone and turn.scores and (fuses_scores or turn.gathers)
        turn.state.record(turn.num_tokens, turn.scores)
        if turn.has_work:
            task = Task(
                turn.state,
                turn.num_computed,
                turn.num_tokens,
                query_starts[row],
                block_table[row, :num_blocks],
                fused,
            )
            tasks.append(task)
        if turn.compacts:
            assert turn.num_tokens == turn.state.plan.num_prompt_tokens, (
                "a chunk crossed the prompt"
            )
        elif fused or turn.gathers:
            # The kernel must be given something: the last block.
            first_blocks[row] = num_blocks - 1
        else:
            first_blocks[row] = turn.first_read_token // block_size
    return StepView(first_blocks, tasks, turns)


def select(turn: Turn | None) -> Selection:
    """Return what a decode row of `turn` reads; None for a row of stock's."""
    if turn is None or turn.is_prefix or turn.compacts:
        return Selection()
    if not turn.gathers:
        return Selection(turn.first_read_token)
    start, plan = turn.first_read_token, turn.state.plan
    num_core, stop = plan.num_core_blocks * plan.block_size, plan.num_full_tokens
    if turn.reads_all:
        num_chosen = num_core if turn.chooses_in_pass else 0
        return Selection(start, start, 0, turn.scores, stop, num_chosen)
    return Selection(stop, start, num_core)


def shift(
    first_blocks: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let every row of a block table begin at its first block.

    Args:
        first_blocks: [num_reqs] int32.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32.
        block_size: the kernel's.
        out: where to put the results; None for new tensors.

    Returns:
        block table and sequence lengths of what is read.
    """
    last = block_table.shape[1] - 1
    columns = torch.arange(last + 1, device=block_table.device)
    columns = (columns + first_blocks.unsqueeze(1)).clamp_(max=last)
    table_out, lens_out = out or (None, None)
    return (
        torch.gather(block_table, 1, columns, out=table_out),
        torch.sub(seq_lens, first_blocks * block_size, out=lens_out),
    )
