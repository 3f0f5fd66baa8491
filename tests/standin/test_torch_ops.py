"""The operators in torch do what those of vLLM's CPU build do."""

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform

from standin.torch_ops import OPERATORS

TOKENS, HEADS, HEAD_SIZE = 5, 3, 32
WIDTH = HEADS * HEAD_SIZE


def rows(width=WIDTH):
    return torch.randn(TOKENS, width)


def positions_and_heads():
    cache = torch.randn(64, HEAD_SIZE)
    return torch.randint(64, (TOKENS,)), rows(), rows(HEAD_SIZE), HEAD_SIZE, cache, True


ARGUMENTS = {
    "rms_norm": lambda: (torch.empty(TOKENS, WIDTH), rows(), rows()[0], 1e-5),
    "fused_add_rms_norm": lambda: (rows(), rows(), rows()[0], 1e-5),
    "silu_and_mul": lambda: (torch.empty(TOKENS, WIDTH), rows(2 * WIDTH)),
    "gelu_quick": lambda: (torch.empty(TOKENS, WIDTH), rows()),
    "rotary_embedding": positions_and_heads,
}


def copied(arguments):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def differs(one, other):
    return isinstance(one, torch.Tensor) and not torch.equal(one, other)


@pytest.mark.parametrize("schema", OPERATORS)
def test_writes_what_the_cpu_build_writes(schema):
    CpuPlatform.import_kernels()
    torch.manual_seed(0)
    name = schema.split("(")[0]
    arguments = ARGUMENTS[name]()
    ours, theirs = copied(arguments), copied(arguments)
    OPERATORS[schema](*ours)
    getattr(torch.ops._C, name)(*theirs)
    assert any(map(differs, theirs, arguments)), "nothing was written"
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
