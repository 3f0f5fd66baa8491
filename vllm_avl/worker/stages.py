"""Lets what pipeline stages count reach the last one, which answers the scheduler."""

from __future__ import annotations

import torch
from vllm.distributed import get_pp_group

from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import key

NAMES = key("core_rows_selected"), key("core_rows_entered")
"""What each stage counts in its own layers. The rest is the same on all, or the host's
time of one."""


class Stages:
    """What this stage has on its way to the next."""

    def __init__(self) -> None:
        self._sent: tuple[torch.distributed.Work, torch.Tensor] | None = None

    def pass_on(self, counts: Counts, device: torch.device) -> None:
        """Add what the stages in front counted in this step, and send it on.

        All stages have to call it in the same steps.

        Args:
            counts: of this stage; it loses what is sent.
            device: of the stages' messages, on which nobody waits for a number.
        """
        group = get_pp_group()
        if group.world_size == 1:
            return
        sums = torch.stack([_number(counts.pop(name, 0.0), device) for name in NAMES])
        if not group.is_first_rank:
            before = torch.empty_like(sums)
            torch.distributed.recv(before, group.prev_rank, group.device_group)
            sums += before
        if group.is_last_rank:
            counts.update(zip(NAMES, sums, strict=True))
            return
        if self._sent is not None:
            self._sent[0].wait()
        # Kept until it has arrived.
        work = torch.distributed.isend(sums, group.next_rank, group.device_group)
        assert work is not None
        self._sent = work, sums


def _number(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())
