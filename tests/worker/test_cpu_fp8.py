"""An fp8 cache that vLLM's CPU kernel wrote is read by ours as by vLLM's own."""

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm_avl.kernels.cpu import DecodeRows, reference
from vllm_avl.kernels.cpu.vectors import ELEMENTS, FP8

from vllm_avl.worker.cpu.cache import PACKED, READABLE, CPUCache
from vllm_avl.worker.fp8 import as_numbers

pytestmark = pytest.mark.skipif(FP8 not in ELEMENTS, reason="needs AVX-512")
KERNELS = [
    ("vec", torch.float32),
    ("vec", torch.bfloat16),
    pytest.param(
        *(PACKED, torch.bfloat16),
        marks=pytest.mark.skipif(
            PACKED not in READABLE or not torch.cpu._is_amx_tile_supported(),
            reason="no AMX",
        ),
    ),
]
NUM_TOKENS, NUM_ROWS, NUM_KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 300, 40, 2, 3, 64, 32
SCALES = {"k_scale": 0.03, "v_scale": 0.7}
SCALE, SOFT_CAP = 0.3, 4.0


def split(cache):
    """Keys and values, as vLLM's kernel is given them."""
    return cache.view(*cache.shape[:2], 2 * BLOCK_SIZE, -1).chunk(2, 2)


class Sequence:
    """A sequence in a cache of vLLM's, and its last rows' queries."""

    def __init__(self, isa, dtype):
        torch.manual_seed(0)
        self.isa = isa
        num_blocks = -(-NUM_TOKENS // BLOCK_SIZE)
        self.blocks = torch.randperm(num_blocks, dtype=torch.int32) + 1
        shape = num_blocks + 1, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        caches = [torch.full(shape, 0x7E, dtype=torch.uint8) for _ in range(2)]
        self.cache, by_column = caches
        rows = NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE
        keys, values = torch.randn(2, *rows).to(dtype)
        slots = torch.arange(NUM_TOKENS)
        slots = self.blocks[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE
        named = {"kv_cache_dtype": "fp8", **SCALES}
        for cache, kernel in zip(caches, (isa, "vec"), strict=True):
            halves = split(cache)
            ops.cpu_attn_reshape_and_cache(
                keys, values, *halves, slots.long(), kernel, **named
            )
        of_layer = HEAD_SIZE, SCALE, SOFT_CAP
        self.by_column = CPUCache(as_numbers(by_column), *of_layer).halves
        self.query = torch.randn(NUM_ROWS, GROUP * NUM_KV_HEADS, HEAD_SIZE).to(dtype)
        self.ours = CPUCache(
            as_numbers(self.cache), *of_layer, packed=isa == PACKED, **SCALES
        )

    def stock(self):
        """Rows' attention by vLLM's kernel."""
        output = torch.empty_like(self.query)
        starts = torch.tensor([0, NUM_ROWS], dtype=torch.int32)
        lengths = torch.tensor([NUM_TOKENS], dtype=torch.int32)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self.query.shape[1],
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=lengths,
            dtype=self.query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="fp8",
        )
        key_cache, value_cache = split(self.cache)
        ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.blocks[None],
            softcap=SOFT_CAP,
            scheduler_metadata=metadata,
            s_aux=None,
            dynamic_causal=None,
            kv_cache_dtype="fp8",
            **SCALES,
        )
        return output

    def exact(self):
        """The same in fp64."""
        output = torch.empty_like(self.query, dtype=torch.float64)
        read = self.by_column, self.blocks, NUM_TOKENS, SCALE, SOFT_CAP
        reference.attention_scores(self.query.double(), *read, output, **SCALES)
        return output


def check(ours, stock, exact):
    error = (ours.double() - exact).abs().max()
    budget = 2 * (stock.double() - exact).abs().max() + 4e-7 * exact.abs().max()
    assert error <= budget
    assert budget < 0.03 * exact.abs().max()


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
def test_scoring_rows(isa, dtype):
    sequence = Sequence(isa, dtype)
    output = torch.empty_like(sequence.query)
    sequence.ours.score(sequence.query, sequence.blocks, NUM_TOKENS, output)
    check(output, sequence.stock(), sequence.exact())


@pytest.mark.parametrize(("isa", "dtype"), KERNELS)
def test_a_decode_row(isa, dtype):
    sequence = Sequence(isa, dtype)
    one, nothing = np.ones(1, np.int64), np.zeros(1, np.int64)
    rows = DecodeRows(
        nothing + NUM_ROWS - 1,
        sequence.blocks[None],
        one * NUM_TOKENS,
        nothing,
        nothing,
        nothing.astype(bool),
    )
    output = torch.empty_like(sequence.query)
    sequence.ours.attend(sequence.query, rows, nothing, output)
    check(output[-1], sequence.stock()[-1], sequence.exact()[-1])
