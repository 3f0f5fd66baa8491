"""What the compiler makes of the kernels: no spills, wide accesses."""

from functools import partial

import pytest
import torch
from vllm_avl.kernels.cuda.copy_rows import copy_rows
from vllm_avl.kernels.cuda.rank_rows import rank_rows
from vllm_avl.kernels.cuda.select_core import select_core
from vllm_avl.kernels.cuda.vision_scores import vision_scores

from benchmarks.kernels.select_rows_matmul import (
    select_columns_matmul,
    select_rows_matmul,
)
from benchmarks.testing.compiled import compile_launches, variants

# Shared memory that a program may have on the smallest GPUs of these generations.
SHARED = 99 * 1024
ARCHES = [80, 90, 100]


def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def blocks_of(num_blocks, row=0):
    """Blocks of a request, in a row of a table that is not a multiple of 16 wide."""
    return empty(1000)[131 * row :][:num_blocks]


def rows_of(num_kv_heads, head_size, dtype):
    return empty(9, 16, num_kv_heads, 2 * head_size, dtype=dtype).transpose(1, 2)


def caches(num_kv_heads, head_size, dtype):
    cache = rows_of(num_kv_heads, head_size, dtype)
    return cache[..., :head_size], cache[..., head_size:]


def score(num_rows, head_size, dtype, key_dtype=None, soft_cap=0.0):
    keys, _ = caches(4, head_size, key_dtype or dtype)
    k_scale = key_dtype and empty(1, dtype=torch.float32)
    query = empty(num_rows, 28, head_size, dtype=dtype)
    vision_scores(query, keys, empty(84), 1333, 0.1, soft_cap, k_scale)


def copy(num_rankings, head_size, dtype, target=False, in_place=False):
    slots = empty(num_rankings, 2000)
    blocks, targets = (blocks_of(84, row) for row in (1, 2))
    to = slots if target else None
    cache = rows_of(4, head_size, dtype)
    copy_rows(cache, blocks, slots, targets, to, in_place=in_place)


def select(head_size, dtype):
    rows = empty(2, 4, 500, head_size, dtype=dtype)
    select_columns_matmul(rows[:, :, :1], rows, empty(2, 96))
    select_rows_matmul(empty(2, 4, 1, 96, dtype=dtype), rows, empty(2, 96))


def choose_of_prompt(num_rankings):
    scores = empty(num_rankings, 2304, dtype=FP32)
    rank_rows(scores, scores, 1200, 300)


def choose_core(num_heads):
    scores, of_requests = empty(num_heads, 4096, dtype=FP32), [empty(8)] * 2
    buffers = empty(4096), empty(1, 4096), empty(1)
    select_core(scores, *buffers, empty(8, 84), 32, *of_requests)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
SCORES = [
    partial(score, 1, 128, BF16),
    partial(score, 32, 128, FP16, soft_cap=30.0),
    partial(score, 32, 80, BF16),
    partial(score, 32, 256, FP32, soft_cap=30.0),
    partial(score, 1, 128, BF16, FP8),
]
COPIES = [
    partial(copy, 1, 128, BF16),
    partial(copy, 4, 80, FP8, target=True),
    partial(copy, 4, 128, FP32, in_place=True),
    partial(copy, 1, 256, FP32),
]
SELECTIONS = [partial(select, 128, FP16), partial(select, 80, FP32)]
CHOICES = [partial(choose_of_prompt, n) for n in (1, 8)]
CHOICES += [partial(choose_core, n) for n in (1, 4, 32)]


@pytest.fixture(scope="module")
def machines():
    """By launch and architecture, all that the launch compiles."""
    launches = [
        (launch, arch)
        for launch in SCORES + COPIES + SELECTIONS + CHOICES
        for arch in ARCHES
        # sm_80 has no fp8.
        if arch >= 89 or not (launch.func is score and FP8 in launch.args)
    ]
    compiled = compile_launches(launches)
    return dict(zip(launches, compiled, strict=True))


def test_registers_suffice(machines):
    for built in machines.values():
        for machine in built:
            assert not machine.stack, machine.kernel
            assert not [i for i in machine.instructions if i.startswith(("LDL", "STL"))]


def test_shared_memory_suffices(machines):
    for (launch, _), built in machines.items():
        # Head size 256 is for data-centre GPUs.
        if 256 not in launch.args:
            assert all(machine.shared <= SHARED for machine in built)


def test_keys_are_read_16_bytes_at_a_time(machines):
    for (launch, _), built in machines.items():
        if launch.func is score:
            for machine in built:
                assert machine.loads[16] >= 2
                # What is narrow is no cache: block ids, positions, maxima and sums.
                assert set(machine.loads) <= {4, 16}


def test_scores_are_written_in_wide_pieces(machines):
    for (launch, _), built in machines.items():
        if launch.func is score:
            assert set(built[1].stores) <= {8, 16}


def test_rows_are_copied_16_bytes_at_a_time(machines):
    for (launch, _), built in machines.items():
        if launch in COPIES:
            for machine in built:
                assert set(machine.stores) == {16}
                # Block ids and slots are narrow.
                assert machine.loads[16] >= machine.stores[16]
                assert set(machine.loads) <= {4, 16}


def test_selected_rows_are_read_16_bytes_at_a_time(machines):
    for (launch, _), built in machines.items():
        if launch in SELECTIONS:
            for machine in built:
                assert machine.loads[16] >= 2


def serve(num_tokens, num_rows, row, num_text, num_core):
    """What the end of a prompt launches; then a refresh of it."""
    keys, _ = caches(4, 128, BF16)
    blocks = blocks_of(-(-num_tokens // 16), row)
    query = empty(num_rows, 28, 128, dtype=BF16)
    vision_scores(query, keys, blocks, num_tokens, 0.1)
    num_ranked = num_tokens // 16 * 16 - num_text
    scores = empty(1, num_ranked, dtype=FP32)
    chosen = rank_rows(scores, scores, num_ranked // 2, num_core)
    targets = blocks_of(40, row + 1)
    for in_place in (False, True):
        cache = rows_of(4, 128, BF16)
        copy_rows(cache, blocks, chosen, targets, in_place=in_place)
    buffers = empty(4096), empty(1, 4096), empty(1)
    scores = empty(1, 4096, dtype=FP32)
    select_core(scores, *buffers, blocks.unsqueeze(0), 16, empty(1), empty(1))


def test_another_prompt_compiles_nothing_anew():
    """A first launch of a variant stops the server for as long as it compiles."""
    first = variants(partial(serve, 1333, 17, 0, 40, 1))
    for prompt in [(1344, 19, 1, 1, 16), (1201, 30, 2, 16, 77), (1329, 17, 3, 33, 160)]:
        assert variants(partial(serve, *prompt)) == first
    assert len(first) == 7
