"""Caches packed in pairs give what the same rows do that lie by column."""

from functools import partial

import pytest
import test_attention
import test_copy_rows_on_cpu as copies
import test_scores
import torch
from caches import bits, scales, within_twice_eager
from vllm_avl.kernels.cpu import (
    attention_scores,
    copy_rows,
    reference,
    selected_attention,
)
from vllm_avl.kernels.cpu.pairs import PAIRS
from vllm_avl.kernels.cpu.vectors import FP8

pytestmark = pytest.mark.skipif(
    not PAIRS, reason="no instruction for products of pairs"
)

needs_amx = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="no AMX: vLLM does not pack here"
)


def packed(kv_cache, head_size):
    """The same rows, packed."""
    keys, values = reference.split(kv_cache, head_size)
    keys = keys.unflatten(2, (-1, 16)).unflatten(-1, (-1, 2)).transpose(3, 4)
    values = values.unflatten(2, (-1, 2)).unflatten(-1, (-1, 16))
    values = values.permute(0, 1, 4, 2, 5, 3)
    return torch.stack([half.flatten(2) for half in (keys, values)], 2)


DTYPES = [torch.bfloat16, FP8]


@needs_amx
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("block_size", [32, 96])
def test_rows_lie_as_vllms_amx_kernel_writes_them(block_size, head_size, dtype):
    from vllm import _custom_ops as ops

    shape = 5 * block_size, 3, head_size
    keys, values = torch.randn(2, *shape).bfloat16()
    caches = {}
    for kernel in ("vec", "amx"):
        elements = torch.uint8 if dtype == "fp8" else torch.bfloat16
        cache = torch.zeros(5, 3, 2, block_size * head_size, dtype=elements)
        halves = [half.unflatten(-1, (block_size, -1)) for half in cache.unbind(2)]
        slots = torch.arange(len(keys))
        ops.cpu_attn_reshape_and_cache(
            keys, values, *halves, slots, kernel, 1.0, 1.0, dtype
        )
        caches[kernel] = cache
    assert torch.equal(packed(caches["vec"], head_size), caches["amx"])


SHAPES = [name for name, shape in test_scores.SHAPES.items() if shape[4] % 32 == 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_the_same(shape, soft_cap, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query, cache, *rest = test_scores.make(test_scores.SHAPES[shape], dtype)
    by = scales(dtype)
    exact, eager = torch.empty(query.shape).double(), torch.empty_like(query)
    numbers = *rest, soft_cap
    scores = reference.attention_scores(query.double(), cache, *numbers, exact, **by)
    eager_scores = reference.attention_scores(query, cache, *numbers, eager, **by)
    output = torch.empty_like(query)
    cache = packed(cache, query.shape[2])
    ours = attention_scores(query, cache, *numbers, output, packed=True, **by)
    assert within_twice_eager(ours, eager_scores, scores)
    assert within_twice_eager(output, eager, exact)


HEADS = [name for name, shape in test_attention.HEADS.items() if shape[2] % 32 == 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", test_attention.BATCHES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_the_same(heads, batch, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shape = test_attention.HEADS[heads]
    batch = test_attention.Batch(test_attention.BATCHES[batch], shape, dtype)
    exact, exact_weights = batch.attend(
        reference.selected_attention, batch.query.double()
    )
    eager, eager_weights = batch.attend(reference.selected_attention, batch.query)
    batch.cache = packed(batch.cache, shape[2])
    ours, weights = batch.attend(partial(selected_attention, packed=True), batch.query)
    assert within_twice_eager(ours, eager, exact)
    for row, probabilities in weights.items():
        assert within_twice_eager(probabilities, eager_weights[row], exact_weights[row])
        assert not probabilities[exact_weights[row] == 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("count", [1, 31, 96, 150])
@pytest.mark.parametrize("num_rankings", [1, copies.NUM_KV_HEADS])
@pytest.mark.parametrize("has_target", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_copies(in_place, has_target, num_rankings, count, dtype):
    cache, table = copies.make_cache([300, 160], dtype)
    source = copies.slots(num_rankings, 150 if in_place else 300, count)
    target = copies.slots(num_rankings, 150, count) if has_target else None
    targets = table[0, :5].flip(0).contiguous() if in_place else table[1]
    arguments = table[0], source, targets, target
    size = copies.HEAD_SIZE
    ours = packed(cache, size)
    copy_rows(ours, size, *arguments, in_place=in_place, packed=True)
    reference.copy_rows(cache, size, *arguments, in_place=in_place)
    assert torch.equal(bits(ours), bits(packed(cache, size)))
