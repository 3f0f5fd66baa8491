"""Attention of listed rows in machine code: within twice eager's error, and blind."""

import pytest
import torch
from vllm_avl.kernels import host, reference

SCALE, BLOCK_SIZE, HEAD_SIZE, NUM_KV_HEADS = 0.1, 32, 80, 3


def make_rows(lengths):
    """A batch's rows: shuffled blocks, and how much of each sequence a mask governs."""
    num_blocks = [-(-length // BLOCK_SIZE) for length, _ in lengths]
    ids = (torch.randperm(sum(num_blocks)) + 1).split(num_blocks)
    rows = []
    for blocks, (num_tokens, num_masked) in zip(ids, lengths, strict=True):
        mask = torch.rand(num_masked) < 0.3
        mask[: num_masked // 3] = False  # whole blocks that nobody reads
        rows.append(host.Row(blocks, num_tokens, mask if num_masked else None))
    return rows


def is_read(row):
    read = torch.ones(row.num_tokens, dtype=torch.bool)
    if row.mask is not None:
        read[: len(row.mask)] = row.mask
    return read


def make_cache(rows, dtype):
    """Keys and values; whatever no row reads holds NaN."""
    num_blocks = sum(len(row.blocks) for row in rows) + 1
    shape = num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE
    keys, values = torch.full((2, *shape), torch.nan, dtype=dtype)
    for row in rows:
        slots = is_read(row).nonzero().flatten()
        where = row.blocks[slots // BLOCK_SIZE], slice(None), slots % BLOCK_SIZE
        size = len(slots), NUM_KV_HEADS, HEAD_SIZE
        keys[where], values[where] = (
            torch.randn(size).to(dtype),
            torch.randn(size).to(dtype),
        )
    return keys, values


def as_the_kernel_reads(keys, values):
    columns = keys.transpose(-1, -2).flatten(-2)
    return torch.stack([columns, values.flatten(-2)], 2).contiguous()


def expected(query, keys, values, row, soft_cap):
    """The oracle over the rows that are read, as if they were one block."""
    slots = is_read(row).nonzero().flatten()
    where = row.blocks[slots // BLOCK_SIZE], slice(None), slots % BLOCK_SIZE
    one_block = [part[where].transpose(0, 1).unsqueeze(0) for part in (keys, values)]
    arguments = torch.zeros(1, dtype=torch.int64), len(slots), SCALE, soft_cap
    output, paid = reference.scored_attention(query, *one_block, *arguments)
    probabilities = paid.new_zeros(len(paid), row.num_tokens)
    probabilities[:, slots] = paid
    return output, probabilities


BATCHES = {
    "one-token": [(1, 0)],
    "one-row-more-threads-than-blocks": [(40, 32)],
    "exact-blocks": [(128, 128 - 32)],
    "mask-ends-inside-a-block": [(150, 75)],
    "ragged": [(1, 0), (33, 0), (300, 256), (97, 64), (64, 0)],
}


@pytest.mark.parametrize("dtype", host.DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 7, 40])
@pytest.mark.parametrize(("group", "soft_cap"), [(1, 0.0), (3, 2.0)])
@pytest.mark.parametrize("batch", BATCHES)
def test_listed_rows(batch, group, soft_cap, num_threads, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    rows = make_rows(BATCHES[batch])
    keys, values = make_cache(rows, dtype)
    query = torch.randn(len(rows), NUM_KV_HEADS * group, HEAD_SIZE).to(dtype)
    read = host.selected_attention(
        query, as_the_kernel_reads(keys, values), rows, SCALE, soft_cap
    )
    for index, row in enumerate(rows):
        ours = read.output[index], read.probabilities(index, row)
        exact = expected(query[index].double(), keys, values, row, soft_cap)
        eager = expected(query[index], keys, values, row, soft_cap)
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            error = (theirs.double() - truth).abs().max()
            budget = 2 * error + 4e-7 * truth.abs().max()
            assert (mine.double() - truth).abs().max() <= budget
        assert not ours[1][:, ~is_read(row)].any()


def test_nothing_but_its_own_row_is_written():
    torch.manual_seed(0)
    rows = make_rows(BATCHES["ragged"])
    cache = as_the_kernel_reads(*make_cache(rows, torch.float32))
    before = cache.clone()
    query = torch.randn(len(rows), NUM_KV_HEADS, HEAD_SIZE)
    together = host.selected_attention(query, cache, rows, SCALE)
    assert torch.equal(cache.view(torch.int32), before.view(torch.int32))
    for index, row in enumerate(rows):
        alone = host.selected_attention(query[index : index + 1], cache, [row], SCALE)
        assert torch.equal(alone.output[0], together.output[index])
