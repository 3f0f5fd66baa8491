"""Products with selected rows: within twice eager's error, whatever the others hold."""

import inspect
import sys

import pytest
import torch
from poisoned import DEVICE, runnable

from benchmarks.kernels import reference_matmul as reference
from benchmarks.kernels.select_rows_matmul import (
    select_columns_matmul,
    select_rows_matmul,
)

MODULE = sys.modules[select_rows_matmul.__module__]


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE):
        yield


def selected(batch, num_heads, num_tokens, num_selected, head_size, dtype):
    """Rows of one tensor's halves; what is not selected holds NaN."""
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(num_tokens) for _ in range(batch)])
    indices = order[:, :num_selected]
    rows = torch.randn(batch, num_heads, num_tokens, 2 * head_size)
    for one, rest in zip(rows, order[:, num_selected:], strict=True):
        one[:, rest] = float("nan")
    return rows.to(DEVICE, dtype)[..., head_size:], indices.to(DEVICE)


def within_budget(ours, reference_of, *inputs):
    host = [x.cpu() for x in inputs]
    exact = reference_of(host[0].double(), *host[1:])
    eager = reference_of(*host)
    # An ulp of the output's dtype where eager happens to be exact.
    smallest = torch.finfo(eager.dtype).eps * exact.abs().max()
    budget = 2 * (eager.double() - exact).abs().max() + smallest
    assert ours.dtype == eager.dtype
    assert ours.shape == eager.shape
    return (ours.cpu().double() - exact).abs().max() <= budget


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(1, 2, 1, 1, 64, id="one-token"),
    pytest.param(2, 3, 100, 64, 128, id="exact-tile"),
    pytest.param(2, 1, 130, 65, 80, id="tile-plus-1-head-80"),
    pytest.param(3, 2, 300, 200, 96, id="ragged-head-96"),
    pytest.param(1, 1, 70, 70, 256, id="all-head-256"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_heads", "num_tokens", "num_selected", "head_size"), SHAPES
)
def test_selected_columns_of_the_keys(
    batch, num_heads, num_tokens, num_selected, head_size, dtype
):
    key, indices = selected(
        batch, num_heads, num_tokens, num_selected, head_size, dtype
    )
    # Cut out of a projection of queries, keys and values, as models do.
    projected = torch.randn(batch, num_heads, 1, 3 * head_size).to(DEVICE, dtype)
    query = projected[..., :head_size]
    ours = select_columns_matmul(query, key, indices.int())
    assert within_budget(ours, reference.select_columns_matmul, query, key, indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "num_heads", "num_tokens", "num_selected", "head_size"), SHAPES
)
def test_selected_rows_of_the_values(
    batch, num_heads, num_tokens, num_selected, head_size, dtype
):
    value, indices = selected(
        batch, num_heads, num_tokens, num_selected, head_size, dtype
    )
    weights = torch.randn(batch, num_heads, 1, num_selected).to(DEVICE, dtype)
    ours = select_rows_matmul(weights, value, indices.int())
    assert within_budget(ours, reference.select_rows_matmul, weights, value, indices)


@pytest.mark.parametrize("function", [select_columns_matmul, select_rows_matmul])
def test_reference_has_the_same_signature(function):
    oracle = getattr(reference, function.__name__)
    assert inspect.signature(function) == inspect.signature(oracle)
