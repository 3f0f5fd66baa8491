"""Which of vLLM's back ends ours is over on CUDA."""

from types import SimpleNamespace

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_avl.compat.platform import FLASH, OVER, TRITON, find_base
from vllm_avl.support import UnsupportedError

FLEX = AttentionBackendEnum.FLEX_ATTENTION
FLASHINFER = AttentionBackendEnum.FLASHINFER
INVALID = {FLASH: (0, ["dtype not supported", "head_size not supported"])}


def candidates(*backends):
    return [SimpleNamespace(backend=backend) for backend in backends]


@pytest.mark.parametrize(
    ("attention", "valid", "base"),
    [
        ("auto", [FLASH, TRITON, FLEX], FLASH),
        ("auto", [FLASHINFER, FLASH, TRITON], FLASH),
        ("auto", [TRITON, FLASH], TRITON),
        ("auto", [TRITON, FLEX], TRITON),
        ("auto", [FLEX], TRITON),
        ("triton", [FLASH, TRITON], TRITON),
        ("flash", [TRITON, FLASH], FLASH),
    ],
)
def test_it_is_what_was_asked_for_or_what_stock_prefers(attention, valid, base):
    assert find_base(attention, candidates(*valid), {}) == base
    assert base in OVER


def test_flash_attention_is_refused_for_vllms_reasons():
    with pytest.raises(UnsupportedError) as caught:
        find_base("flash", candidates(TRITON), INVALID)
    assert str(caught.value) == (
        "--attention-backend avl cannot have additional_config.avl.attention = 'flash':"
        " FLASH_ATTN does not serve this model on this device (dtype not supported, "
        "head_size not supported); leave it out, or start without --attention-backend "
        "avl"
    )
