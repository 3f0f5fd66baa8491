"""Every kernel against its reference: same signature, error budget, poisoned memory."""

import inspect
import sys

import pytest
import torch
from vllm_avl.kernels import host, reference

from vllm_avl import kernels

POISON = float("nan")


def paged(num_tokens, num_kv_heads, head_size, block_size, dtype, by_column=False):
    """Shuffled blocks of one sequence; every slot that is not its own holds NaN."""
    num_blocks = -(-num_tokens // block_size)
    blocks = torch.randperm(3 * num_blocks)[:num_blocks] + 1
    shape = [3 * num_blocks + 1, num_kv_heads, block_size, head_size]
    if by_column:
        shape[2:] = [head_size, block_size]
    cache = torch.full(shape, POISON, dtype=dtype)
    view = cache.transpose(-1, -2) if by_column else cache
    rows = torch.arange(num_tokens)
    view[blocks[rows // block_size], :, rows % block_size] = torch.randn(
        num_tokens, num_kv_heads, head_size
    ).to(dtype)
    return view, blocks


@pytest.mark.parametrize("name", kernels.__all__)
def test_reference_has_the_same_signature(name):
    ours = inspect.signature(getattr(kernels, name))
    assert ours == inspect.signature(getattr(reference, name))


SHAPES = pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_heads", "num_kv_heads", "head_size", "block_size"),
    [
        pytest.param(1, 1, 4, 2, 64, 32, id="one-token"),
        pytest.param(64, 1, 4, 4, 64, 32, id="exact-blocks-mha"),
        pytest.param(65, 1, 6, 2, 64, 32, id="block-plus-1-group-3"),
        pytest.param(333, 7, 4, 1, 80, 32, id="window-7-head-80"),
        pytest.param(200, 32, 8, 2, 32, 128, id="window-32-block-128"),
        pytest.param(130, 7, 4, 2, 64, 32, id="window-across-two-parts"),
    ],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@SHAPES
def test_attention_scores_error_is_at_most_twice_eager(
    num_tokens,
    num_rows,
    num_heads,
    num_kv_heads,
    head_size,
    block_size,
    soft_cap,
    dtype,
):
    torch.manual_seed(0)
    keys, blocks = paged(
        num_tokens, num_kv_heads, head_size, block_size, dtype, by_column=True
    )
    query = torch.randn(num_rows, num_heads, head_size).to(dtype)
    arguments = (blocks, num_tokens, head_size**-0.5, soft_cap)
    exact = reference.attention_scores(query.double(), keys, *arguments)
    eager = reference.attention_scores(query, keys, *arguments)
    ours = kernels.attention_scores(query, keys, *arguments)
    # Two ulps of fp32 where eager happens to be exact.
    budget = 2 * (eager.double() - exact).abs().max() + 2e-7 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@SHAPES
def test_scored_attention_error_is_at_most_twice_eager(
    num_tokens,
    num_rows,
    num_heads,
    num_kv_heads,
    head_size,
    block_size,
    soft_cap,
    dtype,
):
    torch.manual_seed(0)
    keys, blocks = paged(
        num_tokens, num_kv_heads, head_size, block_size, dtype, by_column=True
    )
    torch.manual_seed(0)
    values, same_blocks = paged(num_tokens, num_kv_heads, head_size, block_size, dtype)
    assert torch.equal(blocks, same_blocks)
    query = torch.randn(num_heads, head_size).to(dtype)
    arguments = (keys, values, blocks, num_tokens, head_size**-0.5, soft_cap)
    exact = reference.scored_attention(query.double(), *arguments)
    eager = reference.scored_attention(query, *arguments)
    row = host.Row(blocks, num_tokens)
    read = host.selected_attention(
        query.unsqueeze(0), halves(keys, values), [row], *arguments[4:]
    )
    compiled = read.output[0], read.probabilities(0, row)
    for ours in (kernels.scored_attention(query, *arguments), compiled):
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            eager_error = (theirs.double() - truth).abs().max()
            budget = 2 * eager_error + 4e-7 * truth.abs().max()
            assert (mine.double() - truth).abs().max() <= budget


def halves(keys, values):
    """A cache as vLLM's CPU kernel lays it out: keys by column, values by row."""
    columns = keys.transpose(-1, -2).flatten(-2)
    return torch.stack([columns, values.flatten(-2)], 2).contiguous()


@pytest.mark.parametrize("dtype", host.DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_compiled_rows_change_places(dtype, num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    keys, blocks = paged(96, 3, 64, 32, dtype)
    values = torch.randn(keys.shape).to(dtype)
    first, second = torch.tensor([0, 5, 40]), torch.tensor([70, 64, 33])
    cache = halves(keys, values)
    reference.exchange_rows(keys, values, blocks, first, second)
    host.exchange_rows(cache, blocks, first, second, 64)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(cache.view(bits), halves(keys, values).view(bits))


def test_scores_of_all_tokens_sum_to_rows_times_heads():
    torch.manual_seed(0)
    keys, blocks = paged(150, 2, 64, 32, torch.float32)
    query = torch.randn(5, 4, 64)
    scores = kernels.attention_scores(query, keys, blocks, 150, 0.1)
    assert scores.sum().item() == pytest.approx(5 * 4, rel=1e-5)


def test_a_row_does_not_see_its_future():
    torch.manual_seed(0)
    keys, blocks = paged(64, 1, 32, 32, torch.float32)
    query = torch.randn(2, 1, 32)
    both = kernels.attention_scores(query, keys, blocks, 64, 1.0)
    only_last = kernels.attention_scores(query[1:], keys, blocks, 64, 1.0)
    assert both[0, 63].item() == pytest.approx(only_last[0, 63].item(), rel=1e-6)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([0, 5, 40], [70, 64, 90]),
        (list(range(0, 60)), list(range(30, 90))),
        (list(range(30, 90)), list(range(0, 60))),
        ([], []),
    ],
    ids=["scattered", "overlap-up", "overlap-down", "nothing"],
)
@pytest.mark.parametrize("rows_at_a_time", [2, 256])
def test_compact_blocks_equals_reference(
    source, target, by_column, rows_at_a_time, monkeypatch
):
    module = sys.modules["vllm_avl.kernels.compact_blocks"]
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows_at_a_time)
    torch.manual_seed(0)
    keys, blocks = paged(96, 2, 64, 32, torch.bfloat16, by_column)
    values = torch.randn(keys.shape).to(torch.bfloat16)
    moves = (torch.tensor(source).long(), torch.tensor(target).long())
    expected = keys.clone(), values.clone()
    reference.compact_blocks(*expected, blocks, *moves)
    kernels.compact_blocks(keys, values, blocks, *moves)
    for ours, theirs in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("heads", [None, [0, 2, 2, 1]], ids=["alike", "on-their-own"])
@pytest.mark.parametrize("name", ["compact_blocks", "exchange_rows"])
@pytest.mark.parametrize("rows_at_a_time", [1, 256])
def test_moves_equal_reference(name, heads, by_column, rows_at_a_time, monkeypatch):
    module = sys.modules[f"vllm_avl.kernels.{name}"]
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows_at_a_time)
    torch.manual_seed(0)
    keys, blocks = paged(96, 3, 64, 32, torch.float32, by_column)
    values = torch.randn(keys.shape)
    moves = (
        torch.tensor([0, 5, 40, 33]),
        torch.tensor([70, 64, 1, 6]),
        None if heads is None else torch.tensor(heads),
    )
    expected = keys.clone(), values.clone()
    getattr(reference, name)(*expected, blocks, *moves)
    getattr(kernels, name)(keys, values, blocks, *moves)
    for ours, theirs in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
