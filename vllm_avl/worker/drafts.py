"""Where a drafter's own layers cache what they draft."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID


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
