"""Attention of decode rows, against the oracle: within twice eager's error, and blind.

Whatever no row reads holds NaN.
"""

import numpy as np
import pytest
import torch
from caches import (
    DTYPES,
    bits,
    poisoned,
    query_dtype,
    scales,
    shuffled_blocks,
    within_twice_eager,
    without_pairs,
    write,
)
from vllm_avl.kernels.cpu import DecodeRows, reference, selected_attention
from vllm_avl.kernels.cpu.vectors import ELEMENTS, FP8

# tokens, slots under a mask, what the mask keeps
BATCHES = {
    "one-token": [(1, 0, "all")],
    "lengths": [(length, 0, "all") for length in (1, 32, 33, 63, 256, 257, 1000)],
    "scattered": [(63, 40, "some"), (1000, 900, "some"), (300, 300, "some")],
    "leading": [(1000, 990, "leading"), (40, 32, "leading")],
    "each-head": [(500, 470, "each head"), (65, 64, "each head")],
    "only-the-tail": [(300, 256, "none"), (90, 70, "none"), (33, 32, "none")],
    "only-the-last-part": [(1000, 999, "none")],
    "mixed": [(70, 0, "all"), (300, 270, "some"), (700, 640, "leading")],
}
HEADS = {
    # KV heads, group, head size, block size
    "mha-64": (3, 1, 64, 32),
    "group-3-head-80": (2, 3, 80, 32),
    "group-8-one-head-128": (1, 8, 128, 96),
    "group-16-head-32": (1, 16, 32, 64),
    "group-9-head-48": (1, 9, 48, 32),
    "head-256": (1, 2, 256, 1056),
}


def make_mask(kind, num_masked, num_kv_heads):
    mask = torch.zeros(num_kv_heads, num_masked, dtype=torch.bool)
    if kind == "leading":
        mask[:, : num_masked // 3 // 32 * 32] = True
    elif kind == "some":
        mask[:] = torch.rand(num_masked) < 0.3
        mask[:, num_masked // 2 : num_masked * 3 // 4] = False
    elif kind == "each head":
        mask[:] = torch.rand(mask.shape) < 0.3
    return mask


class Batch:
    """Rows over a poisoned cache, whose tokens lie among others in a step."""

    def __init__(self, lengths, heads, dtype):
        torch.manual_seed(0)
        num_kv_heads, group, head_size, block_size = heads
        sizes = [num_tokens for num_tokens, _, _ in lengths]
        table, num_blocks = shuffled_blocks(sizes, block_size)
        self.cache = poisoned(num_blocks, num_kv_heads, block_size, head_size, dtype)
        self.kept = [
            make_mask(kind, num_masked, num_kv_heads) for _, num_masked, kind in lengths
        ]
        for blocks, size, mask in zip(table, sizes, self.kept, strict=True):
            for head in range(num_kv_heads):
                read = torch.ones(size, dtype=torch.bool)
                read[: mask.shape[1]] = mask[head]
                slots = read.nonzero().flatten()
                write(self.cache, blocks, slots, head_size, head)
        self.masks = np.array(
            [mask.data_ptr() if mask.numel() else 0 for mask in self.kept]
        )
        strides = [
            mask.shape[1] if kind == "each head" else 0
            for mask, (_, _, kind) in zip(self.kept, lengths, strict=True)
        ]
        num_rows = len(lengths)
        self.rows = DecodeRows(
            np.random.default_rng(0).permutation(num_rows + 2)[:num_rows],
            table,
            np.array(sizes),
            np.array([num_masked for _, num_masked, _ in lengths]),
            np.array(strides),
            np.arange(num_rows) % 2 == 0,
        )
        size = num_kv_heads * group, num_rows + 2, head_size
        self.query = torch.randn(size).to(query_dtype(dtype)).transpose(0, 1)
        self.scale = head_size**-0.5
        self.scales = scales(dtype)

    def attend(self, attention, query, soft_cap=0.0):
        output = torch.full_like(query, 7.0)
        reads = self.cache, self.rows, self.masks
        weights = attention(query, *reads, output, self.scale, soft_cap, **self.scales)
        return output, weights


def check(batch, soft_cap=0.0):
    exact, exact_weights = batch.attend(
        reference.selected_attention, batch.query.double(), soft_cap
    )
    eager, eager_weights = batch.attend(
        reference.selected_attention, batch.query, soft_cap
    )
    ours, weights = batch.attend(selected_attention, batch.query, soft_cap)
    assert within_twice_eager(ours, eager, exact)
    others = np.setdiff1d(np.arange(len(ours)), batch.rows.tokens)
    assert (ours[others] == 7).all()
    assert weights.keys() == exact_weights.keys()
    for row, probabilities in weights.items():
        truth = exact_weights[row]
        assert within_twice_eager(probabilities, eager_weights[row], truth)
        assert not probabilities[truth == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS)
def test_error_is_at_most_twice_eager(heads, batch, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check(Batch(BATCHES[batch], HEADS[heads], dtype))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize < 4], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS)
def test_processors_without_products_of_pairs(heads, batch, dtype, monkeypatch):
    without_pairs(monkeypatch, selected_attention)
    check(Batch(BATCHES[batch], HEADS[heads], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
def test_soft_cap(soft_cap, dtype):
    batch = Batch(BATCHES["mixed"], HEADS["group-3-head-80"], dtype)
    batch.query *= 3
    check(batch, soft_cap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_exact_eight_bits_wide(dtype):
    """One key: the output is its value, which must come back bit by bit."""
    batch = Batch(BATCHES["one-token"], HEADS["mha-64"], dtype)
    output, weights = batch.attend(selected_attention, batch.query)
    _, values = reference.split(batch.cache, 64)
    token, block = batch.rows.tokens[0], batch.rows.block_table[0, 0]
    value = values[block, :, 0].to(output.dtype) * batch.scales.get("v_scale", 1)
    assert torch.equal(bits(output[token]), bits(value))
    assert (weights[0] == 1).all()


@pytest.mark.skipif(FP8 not in ELEMENTS, reason="needs AVX-512")
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_fp8_number_is_read_as_what_it_is(dtype, pairs, monkeypatch):
    if not pairs:
        without_pairs(monkeypatch, selected_attention)
    batch = Batch(BATCHES["one-token"], HEADS["head-256"], FP8)
    batch.query, batch.scales = batch.query.to(dtype), {}
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    _, values = reference.split(batch.cache, 256)
    values[batch.rows.block_table[0, 0], :, 0] = numbers
    output, _ = batch.attend(selected_attention, batch.query)
    read = output[batch.rows.tokens[0]].float()
    assert torch.equal(read.isnan(), numbers.float().isnan().expand_as(read))
    assert torch.equal(read.nan_to_num(), numbers.float().nan_to_num().expand_as(read))


def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(monkeypatch):
    batch = Batch(BATCHES["mixed"], HEADS["group-3-head-80"], torch.bfloat16)
    together, _ = batch.attend(selected_attention, batch.query)
    before = bits(batch.cache).clone()
    for num_threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        for row in range(len(batch.rows.tokens)):
            one = slice(row, row + 1)
            alone = DecodeRows(
                batch.rows.tokens[one],
                batch.rows.block_table[one],
                batch.rows.num_tokens[one],
                batch.rows.num_masked[one],
                batch.rows.mask_stride[one],
                batch.rows.scored[one],
            )
            output = torch.zeros_like(together)
            masks, token = batch.masks[one], batch.rows.tokens[row]
            selected_attention(
                batch.query, batch.cache, alone, masks, output, batch.scale
            )
            assert torch.equal(output[token], together[token])
    assert torch.equal(bits(batch.cache), before)


def test_rows_serve_layer_after_layer():
    batch = Batch(BATCHES["mixed"], HEADS["mha-64"], torch.float32)
    first, _ = batch.attend(selected_attention, batch.query)
    for _ in range(50):
        output, _ = batch.attend(selected_attention, batch.query)
        assert torch.equal(output, first)


@pytest.mark.parametrize("half", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_read_row_that_is_not_finite_spoils_its_own_head_only(value, half):
    batch = Batch(BATCHES["lengths"], HEADS["mha-64"], torch.bfloat16)
    batch.query.abs_()
    halves = reference.split(batch.cache, 64)
    row = 6
    halves[half][batch.rows.block_table[row, 20], 1, 5] = value
    output, _ = batch.attend(selected_attention, batch.query)
    token = batch.rows.tokens[row]
    spoilt = output[token, 1]
    assert (spoilt.isnan() if half == 0 else ~spoilt.isfinite()).all()
    output[token, 1] = 0
    assert output.isfinite().all()


def test_keys_at_minus_infinity_are_not_attended():
    batch = Batch([(600, 0, "all")], HEADS["mha-64"], torch.float32)
    batch.query.abs_()
    keys, values = reference.split(batch.cache, 64)
    for block in batch.rows.block_table[0, :18]:
        keys[block] = -torch.inf
        values[block] = 1e30
    check(batch)


def test_no_rows():
    nothing = np.zeros(0, np.int64)
    table = torch.zeros(0, 3, dtype=torch.int32)
    rows = DecodeRows(nothing, table, *[nothing] * 3, np.zeros(0, bool))
    cache, query = torch.zeros(1, 1, 2, 32 * 64), torch.zeros(2, 1, 64)
    output = torch.ones_like(query)
    assert not selected_attention(query, cache, rows, nothing, output, 1.0)
    assert (output == 1).all()
