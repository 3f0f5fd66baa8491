"""What a drafter's own layers take in, and where they cache it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from vllm_avl.worker.step import drafting


def num_behind(vllm_config: VllmConfig) -> int:
    """Tokens of a drafter's first pass behind the step's, see `Step.repeated`."""
    drafts = vllm_config.speculative_config
    return int(drafts is not None and drafts.uses_draft_model())


def repeat_the_step(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap a draft model's first pass on runner V2: it works as the step does."""

    @functools.wraps(original)
    def _prefill(self: Any, *args: Any, **kwargs: Any) -> None:
        with drafting(0, num_behind=1):
            original(self, *args, **kwargs)

    return _prefill


def continue_the_step(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the passes behind the first on runner V2: they read what is stored."""

    @functools.wraps(original)
    def _multi_step_decode(self: Any, *args: Any, **kwargs: Any) -> None:
        with drafting(1):
            original(self, *args, **kwargs)

    return _multi_step_decode


def place_by_length(original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Wrap a drafter's pass to the next token: its slot follows from its number."""

    @functools.wraps(original)
    def _update_positions_dependent_metadata(
        self: Any,
        positions: torch.Tensor,
        common_attn_metadata: Any,
        batch_size: int,
        input_batch_size: int,
        block_size: int,
    ) -> torch.Tensor:
        common = common_attn_metadata
        after = original(
            self, positions, common, batch_size, input_batch_size, block_size
        )
        if self.vllm_config.model_config.uses_mrope:
            slots = self._slot_mapping_buffer[:batch_size]
            last = common.seq_lens[:batch_size].long() - 1
            block = (last // block_size).unsqueeze(1)
            ids = common.block_table_tensor[:batch_size].gather(1, block).squeeze(1)
            by_length = ids * block_size + last % block_size
            slots.copy_(torch.where(slots == PADDING_SLOT_ID, slots, by_length))
        return after

    return _update_positions_dependent_metadata
