"""Core selection's two costly operations in machine code, for caches on a CPU.

vLLM's CPU kernel cannot give probabilities, and PyTorch moves single columns of a
key block slowly. These are compiled by Numba, which vLLM itself requires, and run on
PyTorch's own OpenMP threads: threads beside those would compete with them, because they
spin while they wait. Each thread takes a share of the KV heads.

A cache is `[num_blocks, num_kv_heads, 2, block_size · head_size]`: a block's keys by
column, then its values by row, as vLLM's kernel lays them out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite.binding import ffi
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

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

    @njit(fastmath=FAST)
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


@njit(fastmath=FAST)
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


@njit
def _exchange(
    cache: Any,
    blocks: Any,  # [num_request_blocks]
    source: Any,  # [num_pairs] positions in the request
    target: Any,
    head_size: int,
    first_head: int,
    end_head: int,
) -> None:
    block_size = cache.shape[3] // head_size
    # What attention has read last is still in the processor's cache.
    for head in range(end_head - 1, first_head - 1, -1):
        for index in range(len(source)):
            one = cache[blocks[source[index] // block_size], head]
            other = cache[blocks[target[index] // block_size], head]
            i, j = source[index] % block_size, target[index] % block_size
            for d in range(head_size):
                kept = one[0, d * block_size + i]
                one[0, d * block_size + i] = other[0, d * block_size + j]
                other[0, d * block_size + j] = kept
            for d in range(head_size):
                kept = one[1, i * head_size + d]
                one[1, i * head_size + d] = other[1, j * head_size + d]
                other[1, j * head_size + d] = kept


_openmp = ctypes.CDLL(None)
_run = _openmp.GOMP_parallel
_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_run.restype = None
_thread_index, _num_threads = _openmp.omp_get_thread_num, _openmp.omp_get_num_threads
for _function in (_thread_index, _num_threads):
    _function.argtypes, _function.restype = [], ctypes.c_int

CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("num_cached_blocks", "num_kv_heads", "group", "head_size", "block_size"),
            *("num_tokens", "num_blocks", "num_pairs"),
            *("cache", "blocks", "query", "output", "weights", "source", "target"),
        )
    ]
    + [("soft_cap", np.float32)],
    align=True,
)
"""Arguments of a call as OpenMP hands them to its threads: sizes, and addresses."""
THREAD = types.void(types.CPointer(numba.from_dtype(CALL)))


@intrinsic
def _pointer(_context: Any, _address: Any, dtype: Any) -> Any:
    pointer = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), generate


@njit
def _array(address: Any, dtype: Any, shape: Any) -> Any:
    return carray(_pointer(address, dtype), shape)


@njit
def _cache(call: Any, dtype: Any) -> Any:
    row = call.block_size * call.head_size
    return _array(
        call.cache, dtype, (call.num_cached_blocks, call.num_kv_heads, 2, row)
    )


@njit
def _blocks(call: Any) -> Any:
    return _array(call.blocks, types.int64, (call.num_blocks,))


@njit
def _heads(call: Any) -> tuple[int, int]:
    """First head of this thread, and first head of the next."""
    index, threads = _thread_index(), _num_threads()
    heads = call.num_kv_heads
    return heads * index // threads, heads * (index + 1) // threads


def _compile(dtype: Any, load: Any) -> tuple[Any, Any]:
    """Make what a thread does for caches of `dtype`: attend, exchange."""
    attend = _compile_attend(load)

    @cfunc(THREAD)
    def attend_in_thread(data: Any) -> None:
        call = carray(data, 1)[0]
        rows = call.num_kv_heads, call.group
        first_head, end_head = _heads(call)
        attend(
            _array(call.query, types.float32, (*rows, call.head_size)),
            _cache(call, dtype),
            _blocks(call),
            call.num_tokens,
            call.soft_cap,
            _array(call.output, types.float32, (*rows, call.head_size)),
            _array(
                call.weights, types.float32, (*rows, call.num_blocks * call.block_size)
            ),
            first_head,
            end_head,
        )

    @cfunc(THREAD)
    def exchange_in_thread(data: Any) -> None:
        call = carray(data, 1)[0]
        first_head, end_head = _heads(call)
        _exchange(
            _cache(call, dtype),
            _blocks(call),
            _array(call.source, types.int64, (call.num_pairs,)),
            _array(call.target, types.int64, (call.num_pairs,)),
            call.head_size,
            first_head,
            end_head,
        )

    return attend_in_thread, exchange_in_thread


_LOADS = {
    torch.float32: (types.float32, _fp32),
    torch.bfloat16: (types.uint16, _bf16),
}
DTYPES = tuple(_LOADS)
"""Element types of caches that this module serves."""


@cache
def _compiled(dtype: torch.dtype) -> tuple[Any, Any]:
    return _compile(*_LOADS[dtype])


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
    queries = (query.float() * scale).view(num_kv_heads, -1, head_size)
    output = torch.empty_like(queries)
    num_slots = len(blocks) * (kv_cache.shape[3] // head_size)
    weights = queries.new_empty(*queries.shape[:2], num_slots)
    attend, _ = _compiled(kv_cache.dtype)
    _call(
        attend,
        kv_cache,
        head_size,
        {"blocks": blocks, "query": queries, "output": output, "weights": weights},
        num_blocks=len(blocks),
        group=queries.shape[1],
        num_tokens=num_tokens,
        soft_cap=soft_cap,
    )
    return output.flatten(0, 1), weights.flatten(0, 1)[:, :num_tokens]


def exchange_rows(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    head_size: int,
) -> None:
    """As `kernels.exchange_rows` for every head, on a cache as this module describes.

    `head_size` is the number of elements of a row.
    """
    _, exchange = _compiled(kv_cache.dtype)
    _call(
        exchange,
        kv_cache,
        head_size,
        {"blocks": blocks, "source": source, "target": target},
        num_blocks=len(blocks),
        num_pairs=len(source),
    )


def start(dtype: torch.dtype) -> None:
    """Compile for caches of `dtype`, so that the first refresh need not wait."""
    if dtype in DTYPES:
        _compiled(dtype)


def _call(
    function: Any,
    kv_cache: torch.Tensor,
    head_size: int,
    tensors: dict[str, torch.Tensor],
    **sizes: float,
) -> None:
    """Run `function` on every OpenMP thread; return when all are done."""
    tensors = {"cache": kv_cache} | {
        name: tensor.contiguous() for name, tensor in tensors.items()
    }
    assert kv_cache.is_contiguous()
    call = np.zeros((), CALL)
    call["num_cached_blocks"], call["num_kv_heads"] = kv_cache.shape[:2]
    call["head_size"], call["block_size"] = head_size, kv_cache.shape[3] // head_size
    for name, tensor in tensors.items():
        call[name] = tensor.data_ptr()
    for name, size in sizes.items():
        call[name] = size
    _run(function.address, call.ctypes.data, torch.get_num_threads(), 0)


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
