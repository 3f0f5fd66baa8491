"""Core selection's two costly operations in machine code, for caches on a CPU.

vLLM's CPU kernel cannot give probabilities, and PyTorch moves single columns of a
key block slowly. These are compiled by Numba, which vLLM itself requires; they hold no
lock, and each of the caller's threads takes a share of the KV heads.

A cache is `[num_blocks, num_kv_heads, 2, block_size · head_size]`: a block's keys by
column, then its values by row, as vLLM's kernel lays them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from numba import njit

# Sums may be taken in any order; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@njit(inline="always")
def _fp32(element: Any) -> Any:
    return element


@njit(inline="always")
def _bf16(element: Any) -> Any:
    # Numba shifts into 64 bits.
    return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)


def _compile_attend(load: Any) -> Any:  # noqa: C901 (three functions in one)
    """Make the attention of one decode row for caches whose elements `load` reads."""

    @njit(inline="always")
    def add_logits(query: Any, keys: Any, logits: Any) -> None:
        size = len(logits)
        for d in range(len(query)):
            factor, column = query[d], keys[d * size : (d + 1) * size]
            for slot in range(size):
                logits[slot] += factor * load(column[slot])

    @njit(inline="always")
    def add_values(weights: Any, values: Any, output: Any) -> None:
        size = len(output)
        for slot in range(len(weights)):
            weight, row = weights[slot], values[slot * size : (slot + 1) * size]
            for d in range(size):
                output[d] += weight * load(row[d])

    @njit(nogil=True, fastmath=FAST)
    def attend(
        query: Any,  # [num_kv_heads, group, head_size], scaled
        cache: Any,
        blocks: Any,  # [num_request_blocks]
        num_tokens: int,
        soft_cap: float,
        output: Any,  # [num_kv_heads, group, head_size]
        weights: Any,  # [num_kv_heads, group, num_request_blocks * block_size]
        first_head: int,
        end_head: int,
    ) -> None:
        group = query.shape[1]
        size = weights.shape[2] // len(blocks)
        for head in range(first_head, end_head):
            weights[head], output[head] = 0, 0
            for index in range(len(blocks)):
                keys = cache[blocks[index], head, 0]
                part = weights[head, :, index * size : (index + 1) * size]
                for member in range(group):
                    add_logits(query[head, member], keys, part[member])
            for member in range(group):
                _softmax(weights[head, member, :num_tokens], soft_cap)
            for index in range(len(blocks)):
                values = cache[blocks[index], head, 1]
                end = min((index + 1) * size, num_tokens)
                for member in range(group):
                    used = weights[head, member, index * size : end]
                    add_values(used, values, output[head, member])

    return attend


@njit(nogil=True, fastmath=FAST)
def _softmax(row: Any, soft_cap: float) -> None:
    if soft_cap > 0:
        for token in range(len(row)):
            row[token] = soft_cap * np.tanh(row[token] / soft_cap)
    largest = row[0]
    for token in range(1, len(row)):
        largest = max(largest, row[token])
    total = np.float32(0)
    for token in range(len(row)):
        row[token] = np.exp(row[token] - largest)
        total += row[token]
    for token in range(len(row)):
        row[token] /= total


ATTEND = {
    torch.float32: _compile_attend(_fp32),
    torch.bfloat16: _compile_attend(_bf16),
}
DTYPES = tuple(ATTEND)
"""Element types of caches that this module serves."""


@njit(nogil=True)
def _swap(
    cache: Any,
    blocks: Any,  # [num_request_blocks]
    first: Any,  # [num_swaps] positions in the request
    second: Any,
    head_size: int,
    first_head: int,
    end_head: int,
) -> None:
    block_size = cache.shape[3] // head_size
    for head in range(first_head, end_head):
        for index in range(len(first)):
            one = cache[blocks[first[index] // block_size], head]
            other = cache[blocks[second[index] // block_size], head]
            i, j = first[index] % block_size, second[index] % block_size
            for d in range(head_size):
                kept = one[0, d * block_size + i]
                one[0, d * block_size + i] = other[0, d * block_size + j]
                other[0, d * block_size + j] = kept
            for d in range(head_size):
                kept = one[1, i * head_size + d]
                one[1, i * head_size + d] = other[1, j * head_size + d]
                other[1, j * head_size + d] = kept


def scored_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.scored_attention`, on a cache as this module describes."""
    num_kv_heads, head_size = kv_cache.shape[1], query.shape[-1]
    block_size = kv_cache.shape[3] // head_size
    queries = (query.float() * scale).view(num_kv_heads, -1, head_size)
    output = torch.empty_like(queries)
    weights = queries.new_empty(*queries.shape[:2], len(blocks) * block_size)
    attend = ATTEND[kv_cache.dtype]
    arrays = (queries.numpy(), _array(kv_cache), blocks.numpy())
    rest = (np.float32(soft_cap), output.numpy(), weights.numpy())
    _share(num_kv_heads, lambda *heads: attend(*arrays, num_tokens, *rest, *heads))
    return output.flatten(0, 1), weights.flatten(0, 1)[:, :num_tokens]


def swap_rows(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    head_size: int,
) -> None:
    """Exchange the rows at positions `first` with those at `second`, for every head.

    Args:
        kv_cache: as this module describes.
        blocks: [num_request_blocks] block ids of the request, int64.
        first: [num_swaps] positions in the request, int64.
        second: [num_swaps] other positions; all are distinct.
        head_size: elements a row holds.
    """
    arrays = (_array(kv_cache), blocks.numpy(), first.numpy(), second.numpy())
    _share(kv_cache.shape[1], lambda *heads: _swap(*arrays, head_size, *heads))


def start(dtype: torch.dtype, cores: Collection[int]) -> None:
    """Compile for caches of `dtype`, so that the first refresh need not wait.

    Args:
        dtype: of the cache; one that is not in DTYPES needs nothing.
        cores: where the threads may run.
    """
    if dtype not in DTYPES:
        return
    _threads.cores = frozenset(cores)
    cache = torch.zeros(2, 2, 2, 64, dtype=dtype)
    blocks = torch.zeros(1, dtype=torch.int64)
    scored_attention(torch.zeros(2, 2), cache, blocks, 1, 1.0)
    swap_rows(cache, blocks, blocks, blocks, 2)


class _Threads:
    """As many threads as PyTorch has, on the cores it was told of.

    vLLM binds the thread that calls us to one core, and its heirs with it.
    """

    def __init__(self) -> None:
        self.cores = frozenset(os.sched_getaffinity(0))

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            torch.get_num_threads(),
            thread_name_prefix="avl",
            initializer=lambda: os.sched_setaffinity(0, self.cores),
        )


_threads = _Threads()


def _share(num_heads: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first_head, end_head)` on every thread; return when all are done."""
    num_threads = min(torch.get_num_threads(), num_heads)
    if num_threads == 1:
        work(0, num_heads)
        return
    borders = [num_heads * i // num_threads for i in range(num_threads + 1)]
    futures = [_threads.pool.submit(work, *share) for share in pairwise(borders)]
    for future in futures:
        future.result()


def _array(cache: torch.Tensor) -> Any:
    """NumPy has no bf16: its bits."""
    if cache.dtype == torch.bfloat16:
        return cache.view(torch.uint16).numpy()
    return cache.numpy()


def _answer_no_special_names(original: Callable[[Any, str], Any]) -> Any:
    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    return __getattr__


# llvmlite's library object answers every name, `__dict__` too, and vLLM 0.32 looks into
# the `__dict__` of every object of every module when an engine starts, and dies of it.
# Goes when either stops.
_library = type(ffi.lib)
_library.__getattr__ = _answer_no_special_names(_library.__getattr__)
