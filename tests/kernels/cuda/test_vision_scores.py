"""Scores of the last rows: within twice eager's error, and blind to what is foreign."""

import sys

import pytest
import torch
from poisoned import DEVICE, paged, runnable
from vllm_avl.kernels.cuda import reference
from vllm_avl.kernels.cuda.vision_scores import vision_scores

MODULE = sys.modules[vision_scores.__module__]
# Triton 3.9's interpreter multiplies bf16 as if its bits were integers.
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="bf16 dot needs a GPU")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=needs_gpu),
]
SHAPES = [
    pytest.param(1, 1, 4, 2, 64, 16, "NHD", id="one-token"),
    pytest.param(64, 1, 4, 4, 64, 32, "HND", id="exact-blocks-mha"),
    pytest.param(65, 1, 6, 2, 64, 64, "NHD", id="block-plus-1-group-3"),
    pytest.param(333, 7, 4, 1, 80, 16, "NHD", id="window-7-head-80"),
    pytest.param(260, 33, 2, 1, 96, 128, "HND", id="2-splits-2-tiles-head-96"),
    pytest.param(5, 5, 2, 1, 256, 16, "NHD", id="every-row-head-256"),
    pytest.param(40, 3, 17, 1, 64, 16, "HND", id="group-17"),
]


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE):
        yield


def within_budget(ours, eager, exact):
    # Two ulps of fp32 where eager happens to be exact.
    budget = 2 * (eager.double() - exact).abs().max() + 2e-7 * exact.abs().max()
    return (ours.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize(
    (
        "num_tokens",
        "num_rows",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "block_size",
        "layout",
    ),
    SHAPES,
)
def test_error_is_at_most_twice_eager(
    num_tokens,
    num_rows,
    num_heads,
    num_kv_heads,
    head_size,
    block_size,
    layout,
    soft_cap,
    dtype,
):
    torch.manual_seed(0)
    keys, values, blocks = paged(
        num_tokens, num_kv_heads, head_size, block_size, dtype, layout
    )
    values.fill_(float("nan"))
    query = torch.randn(num_rows, num_heads, head_size).to(DEVICE, dtype)
    rest = (num_tokens, 2 * head_size**-0.5, soft_cap)
    ours = vision_scores(query, keys, blocks, *rest).cpu()
    query, keys, blocks = query.cpu(), keys.cpu(), blocks.cpu()
    exact = reference.vision_scores(query.double(), keys, blocks, *rest)
    eager = reference.vision_scores(query, keys, blocks, *rest)
    assert ours.shape == (num_heads, num_tokens)
    assert ours.dtype == torch.float32
    assert within_budget(ours, eager, exact)


def run(query, keys, blocks, num_tokens, *rest):
    """Ours and the exact scores."""
    ours = vision_scores(query, keys, blocks, num_tokens, *rest).cpu()
    host = [x.cpu() if isinstance(x, torch.Tensor) else x for x in rest]
    exact = reference.vision_scores(
        query.double().cpu(), keys.cpu(), blocks.cpu(), num_tokens, *host
    )
    return ours.double(), exact


@pytest.mark.parametrize(
    ("keys_per_split", "max_splits"), [(32, 8), (32, 2)], ids=["many", "longer"]
)
def test_splits_give_the_same(keys_per_split, max_splits, monkeypatch):
    monkeypatch.setattr(MODULE, "KEYS_PER_SPLIT", keys_per_split)
    monkeypatch.setattr(MODULE, "MAX_SPLITS", max_splits)
    torch.manual_seed(0)
    keys, _, blocks = paged(130, 1, 64, 16, torch.float32)
    # The last split has no key for most rows.
    query = torch.randn(6, 2, 64, device=DEVICE)
    ours, exact = run(query, keys, blocks, 130, 0.3)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


def test_large_logits_neither_overflow_nor_vanish():
    torch.manual_seed(0)
    keys, _, blocks = paged(600, 1, 64, 16, torch.float32)
    query = torch.randn(3, 2, 64, device=DEVICE)
    ours, exact = run(query, keys, blocks, 600, 30.0)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-6)
    capped, exact = run(query, keys, blocks, 600, 30.0, 50.0)
    torch.testing.assert_close(capped, exact, rtol=1e-3, atol=1e-6)


def test_a_row_does_not_see_its_future():
    torch.manual_seed(0)
    keys, _, blocks = paged(64, 1, 64, 32, torch.float32)
    query = torch.randn(2, 1, 64, device=DEVICE)
    both = vision_scores(query, keys, blocks, 64, 1.0)
    only_last = vision_scores(query[1:], keys, blocks, 64, 1.0)
    assert both[0, 63].item() == pytest.approx(only_last[0, 63].item(), rel=1e-6)


def test_strided_query_and_32_bit_block_ids():
    torch.manual_seed(0)
    keys, _, blocks = paged(100, 2, 64, 16, torch.float32)
    query = torch.randn(4, 7, 3 * 64, device=DEVICE)[:, 1:5, 64:128]
    ours, exact = run(query, keys, blocks.int(), 100, 0.2)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


def test_block_ids_past_the_sequence_are_not_read():
    torch.manual_seed(0)
    keys, _, blocks = paged(48, 1, 64, 16, torch.float32)
    query = torch.randn(1, 2, 64, device=DEVICE)
    stale = torch.full_like(blocks, 1 << 40)
    expected = vision_scores(query, keys, blocks, 48, 0.2)
    ours = vision_scores(query, keys, torch.cat([blocks, stale]), 48, 0.2)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_fp8_keys(layout):
    torch.manual_seed(0)
    keys, _, blocks = paged(70, 2, 64, 16, torch.float8_e4m3fn, layout)
    query = torch.randn(3, 4, 64, device=DEVICE).half()
    k_scale = torch.full([1], 0.37, device=DEVICE)
    ours, exact = run(query, keys, blocks, 70, 0.2, 0.0, k_scale)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)
