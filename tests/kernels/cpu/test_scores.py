"""Scores of cached tokens, against the oracle."""

import pytest
import torch
from caches import (
    DTYPES,
    poisoned,
    query_dtype,
    scales,
    shuffled_blocks,
    within_twice_eager,
    without_pairs,
    write,
)
from vllm_avl.kernels.cpu import attention_scores, reference
from vllm_avl.kernels.cpu.vectors import ELEMENTS, FP8

SHAPES = {
    # tokens, rows, heads, KV heads, head size, block size
    "one-token": (1, 1, 4, 2, 64, 32),
    "only-the-window": (5, 5, 2, 1, 32, 32),
    "exact-blocks": (64, 1, 4, 4, 64, 32),
    "block-plus-1-group-3": (65, 1, 6, 2, 80, 32),
    "ragged-window-7-one-head": (63, 7, 1, 1, 128, 32),
    "group-8-wide-blocks": (1000, 32, 8, 1, 64, 96),
    "window-over-two-parts": (300, 60, 3, 3, 32, 32),
    "head-256": (257, 9, 2, 2, 256, 128),
}

PAIRED = [dtype for dtype in (torch.bfloat16, FP8) if dtype in ELEMENTS]


def make(shape, dtype):
    torch.manual_seed(0)
    num_tokens, num_rows, num_heads, num_kv_heads, head_size, block_size = shape
    table, num_blocks = shuffled_blocks([num_tokens], block_size)
    cache = poisoned(num_blocks, num_kv_heads, block_size, head_size, dtype)
    write(cache, table[0], torch.arange(num_tokens), head_size)
    query = torch.randn(num_heads, num_rows, head_size).to(query_dtype(dtype))
    query = query.transpose(0, 1)
    return query, cache, table[0], num_tokens, head_size**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_eager(shape, soft_cap, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query, *rest = make(SHAPES[shape], dtype)
    by = scales(dtype)
    exact = reference.attention_scores(query.double(), *rest, soft_cap, **by)
    eager = reference.attention_scores(query, *rest, soft_cap, **by)
    ours = attention_scores(query, *rest, soft_cap, **by)
    assert ours.dtype == torch.float32
    assert within_twice_eager(ours, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rows_own_attention_is_written_beside(shape, soft_cap, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query, *rest = make(SHAPES[shape], dtype)
    exact, eager = torch.empty(query.shape).double(), torch.empty_like(query)
    by = scales(dtype)
    reference.attention_scores(query.double(), *rest, soft_cap, exact, **by)
    reference.attention_scores(query, *rest, soft_cap, eager, **by)
    ours = query.new_full((len(query) + 2, *query.shape[1:]), 7.0)
    scores = attention_scores(query, *rest, soft_cap, ours[1:-1], **by)
    assert within_twice_eager(ours[1:-1], eager, exact)
    assert (ours[[0, -1]] == 7).all()
    assert torch.equal(scores, attention_scores(query, *rest, soft_cap, **by))


@pytest.mark.parametrize("dtype", PAIRED, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_processors_without_products_of_pairs(shape, dtype, monkeypatch):
    without_pairs(monkeypatch, attention_scores)
    query, *rest = make(SHAPES[shape], dtype)
    exact, eager = torch.empty(query.shape).double(), torch.empty_like(query)
    scores = reference.attention_scores(query.double(), *rest, output=exact)
    reference.attention_scores(query, *rest, output=eager)
    output = torch.empty_like(query)
    ours = attention_scores(query, *rest, output=output)
    torch.testing.assert_close(ours.double(), scores, atol=2e-6, rtol=2e-6)
    assert within_twice_eager(output, eager, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_nothing(shape, monkeypatch):
    query, *rest = make(SHAPES[shape], torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    output = torch.empty_like(query)
    alone = attention_scores(query, *rest, output=output)
    for num_threads in (2, 5, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        beside = torch.empty_like(query)
        assert torch.equal(attention_scores(query, *rest, output=beside), alone)
        assert torch.equal(beside, output)


@pytest.mark.parametrize("cached", PAIRED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_queries_may_have_another_dtype_than_the_cache(dtype, cached):
    query, *rest = make(SHAPES["group-8-wide-blocks"], cached)
    exact = reference.attention_scores(query.double(), *rest)
    ours = attention_scores(query.to(dtype), *rest)
    assert within_twice_eager(ours, exact, exact) or dtype == torch.float16
    assert (ours - exact).abs().max() < 1e-3


def test_every_row_pays_one():
    query, *rest = make(SHAPES["window-over-two-parts"], torch.float32)
    total = attention_scores(query, *rest).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, len(query)))


def test_logits_far_apart():
    query, *rest, scale = make(SHAPES["group-8-wide-blocks"], torch.float32)
    exact = reference.attention_scores(query.double(), *rest, scale * 200)
    eager = reference.attention_scores(query, *rest, scale * 200)
    assert within_twice_eager(attention_scores(query, *rest, scale * 200), eager, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_spoils_its_own_head_only(value):
    query, cache, *rest = make(SHAPES["window-over-two-parts"], torch.float32)
    keys, _ = reference.split(cache, query.shape[2])
    keys[rest[0][1], 1, 3] = value
    scores = attention_scores(query.abs(), cache, *rest)
    assert scores[1].isnan().any()
    assert scores[[0, 2]].isfinite().all()
