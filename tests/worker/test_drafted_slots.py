"""Where a drafter caches what it drafts, where tokens turn in several axes."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from vllm_avl.worker.drafts import place_by_length

BLOCK_SIZE = 4


def propose(lengths, positions, uses_mrope=True):
    """Slots of a drafter's next token behind requests of `lengths`."""
    slots = torch.full((len(lengths),), 77)

    def original(self, positions, common, *sizes):
        # As vLLM: a token lies where its rotary position says.
        at = positions + 1
        ids = common.block_table_tensor.gather(1, (at // BLOCK_SIZE).unsqueeze(1))
        slots.copy_(ids.squeeze(1) * BLOCK_SIZE + at % BLOCK_SIZE)
        slots[at >= 40] = PADDING_SLOT_ID
        common.seq_lens += 1
        return at

    drafter = SimpleNamespace(
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(uses_mrope=uses_mrope)
        ),
        _slot_mapping_buffer=slots,
    )
    table = torch.arange(100, 100 + 11 * len(lengths), dtype=torch.int32)
    common = SimpleNamespace(
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table_tensor=table.view(len(lengths), 11),
    )
    count = len(lengths)
    moved = place_by_length(original)(
        drafter, torch.tensor(positions), common, count, count, BLOCK_SIZE
    )
    assert moved.tolist() == [position + 1 for position in positions]
    return slots.tolist()


def test_the_next_token_lies_behind_the_last_one():
    assert propose([17, 20], [5, 19]) == [104 * 4 + 1, 116 * 4]


def test_one_axis_is_left_as_it_is():
    assert propose([17], [16], uses_mrope=False) == propose([17], [16])


@pytest.mark.parametrize("uses_mrope", [True, False])
def test_what_vllm_caches_nowhere_is_cached_nowhere(uses_mrope):
    assert propose([40], [39], uses_mrope) == [PADDING_SLOT_ID]
