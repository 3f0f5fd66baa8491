"""Selected attention against its oracle: error budget, poisoned memory, odd shapes.

Without a GPU the kernels run in Triton's interpreter, whose bf16 dot is wrong.
"""

import inspect
import itertools
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from vllm_avl.kernels.cuda import reference_attention, selected_attention
from vllm_avl.kernels.cuda.selected_attention import Refresh

from benchmarks.testing.interpreted import interpreted

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FP8 = torch.float8_e4m3fn
POISON = float("nan")
UNTOUCHED = -7.0


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with nullcontext() if ON_GPU else interpreted(selected_attention):
        yield


@dataclass(frozen=True)
class Case:
    """A batch: of each request its seq_len, tail, listed slots and query rows."""

    requests: tuple[tuple[int, int, int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    soft_cap: float = 0.0
    list_per_head: bool = False
    heads_first: bool = True
    num_splits: int = 2
    max_query_len: int = 1
    scored: tuple[int, ...] | None = None


RAGGED = Case(((200, 40, 90, 1), (37, 37, 0, 1), (0, 0, 0, 0), (150, 20, 130, 1)))
ROWS = replace(RAGGED, requests=((150, 21, 66, 3), (9, 9, 0, 1), (66, 66, 0, 2)))
CASES = {
    "one-token": Case(((1, 1, 0, 1),)),
    "exact-block": Case(((32, 16, 16, 1),)),
    "block-plus-1": Case(((33, 17, 16, 1),)),
    "exact-tiles": Case(((192, 64, 64, 1),), num_splits=1),
    "tile-plus-1": Case(((194, 65, 65, 1),), num_splits=1),
    "ragged": RAGGED,
    "group-3": replace(RAGGED, num_heads=6),
    "mha": replace(RAGGED, num_kv_heads=4),
    "head-80": replace(RAGGED, head_size=80, num_heads=2),
    "head-96": Case(((70, 70, 0, 1),), head_size=96),
    "head-256": Case(((90, 33, 40, 1),), head_size=256, num_heads=2),
    "block-128": replace(RAGGED, block_size=128),
    "3-query-rows": replace(ROWS, max_query_len=3),
    "2-blocks-of-queries": replace(
        ROWS, max_query_len=5, num_heads=12, num_kv_heads=1, num_splits=3
    ),
    "soft-cap": replace(RAGGED, soft_cap=5.0),
    "lists-per-head": replace(RAGGED, list_per_head=True),
    "slots-first": replace(RAGGED, heads_first=False, list_per_head=True),
    "1-split": replace(RAGGED, num_splits=1),
    "4-splits": replace(ROWS, num_splits=4, max_query_len=3),
    "more-splits-than-tiles": replace(RAGGED, num_splits=7),
    "scored": replace(RAGGED, scored=(1, 0, 1, 1), list_per_head=True),
    "scored-1-split": replace(RAGGED, scored=(0, 1, 0, 1), num_splits=1),
    "scored-query-rows": replace(
        ROWS, scored=(1, 1, 0), max_query_len=3, num_heads=6, soft_cap=5.0
    ),
    "scored-first-row": replace(ROWS, scored=(3, 0, 2), max_query_len=3),
    "scored-row-of-the-first-block": replace(
        ROWS, scored=(2, 1, 2), max_query_len=5, num_heads=12, num_kv_heads=1
    ),
}
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if ON_GPU else [])]
FP8_CASES = [
    *("one-token", "slots-first", "3-query-rows"),
    *("scored-query-rows", "scored-first-row"),
]
ALL = [*itertools.product(CASES, DTYPES), *itertools.product(FP8_CASES, [FP8])]


def test_reference_has_the_same_signature():
    ours = inspect.signature(selected_attention.selected_attention)
    assert ours == inspect.signature(reference_attention.selected_attention)


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_error_is_at_most_twice_eager(name, dtype):
    case = CASES[name]
    torch.manual_seed(0)
    inputs = build(case, dtype)
    query = inputs.pop("query")
    exact = attend(reference_attention, query.double(), case, inputs)
    eager = attend(reference_attention, query, case, inputs)
    ours = attend(selected_attention, query, case, inputs)
    for what, mine, theirs, truth in zip(
        ("output", "lse", "scores"), ours, eager, exact, strict=True
    ):
        eager_error = (theirs.double() - truth).abs().max()
        budget = 2 * eager_error + 4e-7 * truth.abs().max()
        error = (mine.double() - truth).abs().max()
        assert error <= budget, f"{what}: {error:.1e} > {budget:.1e}"


def test_a_given_scratch_is_used():
    case = CASES["ragged"]
    inputs = build(case, torch.float32)
    query = inputs.pop("query")
    shape = *query.shape[:2], case.num_splits
    partial = query.new_zeros(*shape, query.shape[2]), query.new_zeros(shape)
    given = attend(selected_attention, query, case, {**inputs, "partial": partial})
    assert partial[1].any()
    assert torch.equal(given[0], attend(selected_attention, query, case, inputs)[0])


def attend(module, query, case, inputs):
    """Output, lse and scores, where what nobody may write stays UNTOUCHED."""
    wide = torch.promote_types(query.dtype, torch.float32)
    num_rows = inputs["core_list"].shape[1]
    output = torch.full_like(query, UNTOUCHED)
    lse = query.new_full(query.shape[:2], UNTOUCHED, dtype=wide)
    scores = query.new_full((case.num_kv_heads, num_rows), UNTOUCHED, dtype=wide)
    refresh = None
    if case.scored:
        logits = scores.new_full((case.num_heads, num_rows), POISON)
        scored = torch.tensor(case.scored, dtype=torch.int32, device=DEVICE)
        refresh = Refresh(scored, scores, logits)
    module.selected_attention(
        query,
        **inputs,
        scale=case.head_size**-0.5,
        soft_cap=case.soft_cap,
        output=output,
        lse=lse,
        max_query_len=case.max_query_len,
        num_splits=case.num_splits,
        refresh=refresh,
    )
    return output, lse, scores


def build(case, dtype):
    """Tensors of a batch, in which all that must not be read is poison."""
    seq_lens, tails, num_core, query_lens = torch.tensor(case.requests).T
    first_slot = seq_lens - tails
    needed = (-(-seq_lens // case.block_size)).tolist()
    # Past a request the table names the null block, whose rows are poison, too.
    block_table = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int64)
    no_slot = max(needed) * case.block_size
    num_rows = (2 * sum(needed) + 1) * case.block_size
    num_rankings = case.num_kv_heads if case.list_per_head else 1
    core_list = torch.full((num_rankings, num_rows), no_slot)
    rows = torch.full((2, num_rows, case.num_kv_heads, case.head_size), POISON)
    ids = torch.randperm(2 * sum(needed)) + 1
    for request, blocks in enumerate(ids[: sum(needed)].split(needed)):
        block_table[request, : len(blocks)] = blocks
        mine = blocks[:, None] * case.block_size + torch.arange(case.block_size)
        mine = mine.flatten()[: seq_lens[request]]
        entries = mine[: num_core[request]]
        for ranking in core_list:
            past = torch.randperm(int(first_slot[request]))
            ranking[entries] = past[: num_core[request]]
        for head in range(case.num_kv_heads):
            core = mine[core_list[head % num_rankings, entries]]
            read = torch.cat([core, mine[first_slot[request] :]])
            rows[:, read, head] = torch.randn(2, len(read), case.head_size)
    query_start_loc = torch.cat([torch.zeros(1), query_lens.cumsum(0)])
    integers = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "query_start_loc": query_start_loc,
        "first_slot": first_slot,
        "core_list": core_list,
        "num_core": num_core,
    }
    # One token more than the requests have, as a CUDA graph pads.
    shape = int(query_lens.sum()) + 1, case.num_heads, case.head_size
    query = torch.randn(shape, device=DEVICE)
    cache = page(rows, case).to(dtype).to(DEVICE)
    return {
        "query": query.to(torch.float16 if dtype == FP8 else dtype),
        "key_cache": cache[..., : case.head_size],
        "value_cache": cache[..., case.head_size :],
        **{name: x.to(torch.int32).to(DEVICE) for name, x in integers.items()},
        "k_scale": torch.tensor([0.4], device=DEVICE) if dtype == FP8 else None,
        "v_scale": torch.tensor([1.7], device=DEVICE) if dtype == FP8 else None,
    }


def page(rows, case):
    """Keys and values as halves of a row: [blocks, heads, slots, 2 * head_size]."""
    paged = torch.cat(list(rows), -1).unflatten(0, (-1, case.block_size))
    if case.heads_first:
        return paged.transpose(1, 2).contiguous()
    return paged.contiguous().transpose(1, 2)
