"""What core selection costs most, in machine code, for caches on a CPU.

vLLM's CPU kernel can neither leave rows out nor give probabilities, and PyTorch moves
single columns of a key block slowly. The loops are compiled by Numba, which vLLM itself
requires, and run on PyTorch's own OpenMP threads: threads beside those would compete
with them, because they spin while they wait.

A cache is `[num_blocks, num_kv_heads, 2, block_size · head_size]`: a block's keys by
column, then its values by row, as vLLM's kernel lays them out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite.binding import ffi
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from vllm_avl.kernels.host_loops import compile_attend, exchange


@njit(inline="always")
def _fp32(element: Any) -> Any:
    return element


@njit(inline="always")
def _bf16(element: Any) -> Any:
    # Numba shifts into 64 bits.
    return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)


_openmp = ctypes.CDLL(None)
_run = _openmp.GOMP_parallel
_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_run.restype = None
_thread_index, _num_threads = _openmp.omp_get_thread_num, _openmp.omp_get_num_threads
for _function in (_thread_index, _num_threads):
    _function.argtypes, _function.restype = [], ctypes.c_int


def _numbers(*names: str) -> list[tuple[str, type]]:
    return [(name, np.int64) for name in names]


ROW = np.dtype(
    _numbers("blocks", "num_blocks", "num_tokens", "mask", "num_masked", "weights")
)
"""One row that attends: sizes, and addresses."""
CALL = np.dtype(
    [
        *_numbers("num_cached_blocks", "num_kv_heads", "head_size", "block_size"),
        *_numbers("group", "num_rows", "num_parts", "num_blocks", "num_pairs"),
        *_numbers("cache", "rows", "query", "output", "norms"),
        *_numbers("blocks", "source", "target"),
        ("soft_cap", np.float32),
    ],
    align=True,
)
"""Arguments of a call as OpenMP hands them to its threads."""
_ROW = numba.from_dtype(ROW)
THREAD = types.void(types.CPointer(numba.from_dtype(CALL)))


@intrinsic
def _pointer(_context: Any, _address: Any, dtype: Any) -> Any:
    named = isinstance(dtype, types.TypeRef)
    pointer = types.CPointer(dtype.instance_type if named else dtype.dtype)

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
def _share(size: int) -> tuple[int, int]:
    """First of `size` items that this thread does, and first of the next thread."""
    index, threads = _thread_index(), _num_threads()
    return size * index // threads, size * (index + 1) // threads


def _compile(dtype: Any, load: Any) -> tuple[Any, Any]:
    """Make what a thread does for caches of `dtype`: attend, exchange."""
    attend = compile_attend(load, dtype.bitwidth // 8)

    @cfunc(THREAD)
    def attend_in_thread(data: Any) -> None:
        call = carray(data, 1)[0]
        heads, parts, group = call.num_kv_heads, call.num_parts, call.group
        cached = _cache(call, dtype)
        rows = _array(call.rows, _ROW, (call.num_rows,))
        of_row = heads, group, call.head_size
        queries = _array(call.query, types.float32, (call.num_rows, *of_row))
        of_part = call.num_rows, parts, heads, group
        outputs = _array(call.output, types.float32, (*of_part, call.head_size))
        norms = _array(call.norms, types.float32, (*of_part, 2))
        first_item, end_item = _share(call.num_rows * heads * parts)
        for item in range(first_item, end_item):
            number, rest = divmod(item, heads * parts)
            head, part = divmod(rest, parts)
            row = rows[number]
            slots = row.num_blocks * call.block_size
            weights = _array(row.weights, types.float32, (heads, group, slots))
            attend(
                queries[number, head],
                cached,
                head,
                _array(row.blocks, types.int64, (row.num_blocks,)),
                row.num_blocks * part // parts,
                row.num_blocks * (part + 1) // parts,
                row.num_tokens,
                _array(row.mask, types.uint8, (row.num_masked,)),
                call.soft_cap,
                outputs[number, part, head],
                weights[head],
                norms[number, part, head],
            )

    @cfunc(THREAD)
    def exchange_in_thread(data: Any) -> None:
        call = carray(data, 1)[0]
        first_head, end_head = _share(call.num_kv_heads)
        # What attention has read last is still in the processor's cache.
        for head in range(end_head - 1, first_head - 1, -1):
            exchange(
                _cache(call, dtype),
                head,
                _array(call.blocks, types.int64, (call.num_blocks,)),
                _array(call.source, types.int64, (call.num_pairs,)),
                _array(call.target, types.int64, (call.num_pairs,)),
                call.head_size,
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


class Row(NamedTuple):
    """What one decode row attends to."""

    blocks: torch.Tensor
    """[cdiv(num_tokens, block_size)] block ids of its sequence, int64."""
    num_tokens: int
    """Keys in the sequence."""
    mask: torch.Tensor | None = None
    """[num_masked] bool, which of the first keys are read; all behind them are."""


class Attention(NamedTuple):
    """What decode rows have read."""

    output: torch.Tensor
    """[num_rows, num_heads, head_size] fp32."""
    weights: list[torch.Tensor]
    """Of each row, [num_kv_heads, group, num_slots] fp32, before normalising."""
    factors: torch.Tensor
    """[num_rows, num_parts, num_kv_heads, group], which normalise the weights."""

    def probabilities(self, index: int, row: Row) -> torch.Tensor:
        """[num_heads, num_tokens] attention that the row at `index` paid, fp32."""
        weights, factors = self.weights[index], self.factors[index].unsqueeze(-1)
        num_blocks, num_parts = len(row.blocks), len(factors)
        block_size = weights.shape[-1] // num_blocks
        starts = [num_blocks * part // num_parts for part in range(1, num_parts)]
        parts = weights.tensor_split([start * block_size for start in starts], -1)
        normed = [part * factor for part, factor in zip(parts, factors, strict=True)]
        return torch.cat(normed, -1).flatten(0, 1)[:, : row.num_tokens]


def selected_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    rows: Sequence[Row],
    scale: float,
    soft_cap: float = 0.0,
) -> Attention:
    """Attend from decode rows to the selected keys of their sequences.

    Values that are not selected are not read, nor are blocks without a selected key.

    Args:
        query: [num_rows, num_heads, head_size].
        kv_cache: as this module describes.
        rows: what each of them reads.
        scale: softmax scale.
        soft_cap: tanh cap on the logits, 0 for none.
    """
    num_kv_heads, head_size = kv_cache.shape[1], query.shape[-1]
    queries = (query.float() * scale).unflatten(1, (num_kv_heads, -1))
    num_rows, _, group, _ = queries.shape
    num_parts = -(-torch.get_num_threads() // (num_rows * num_kv_heads))
    outputs = queries.new_empty(num_rows, num_parts, *queries.shape[1:])
    norms = queries.new_empty(*outputs.shape[:-1], 2)
    block_size = kv_cache.shape[3] // head_size
    weights = [
        queries.new_empty(num_kv_heads, group, len(row.blocks) * block_size)
        for row in rows
    ]
    _call(
        _compiled(kv_cache.dtype)[0],
        kv_cache,
        head_size,
        {"query": queries, "output": outputs, "norms": norms},
        rows=_records(rows, weights),
        num_rows=num_rows,
        num_parts=num_parts,
        group=group,
        soft_cap=soft_cap,
    )
    largest, total = norms.unbind(-1)
    if num_parts == 1:
        factors = total.reciprocal()
    else:
        factors = (largest - largest.amax(1, keepdim=True)).exp_()
        factors /= (factors * total).sum(1, keepdim=True)
    output = (outputs * factors.unsqueeze(-1)).sum(1)
    return Attention(output.flatten(1, 2), weights, factors)


def _records(rows: Sequence[Row], weights: Sequence[torch.Tensor]) -> np.ndarray:
    records = np.zeros(len(rows), ROW)
    for record, row, of_row in zip(records, rows, weights, strict=True):
        blocks, num_tokens, mask = row
        assert blocks.is_contiguous()
        record["blocks"], record["num_blocks"] = blocks.data_ptr(), len(blocks)
        record["num_tokens"], record["weights"] = num_tokens, of_row.data_ptr()
        if mask is not None:
            assert mask.is_contiguous()
            record["mask"], record["num_masked"] = mask.data_ptr(), len(mask)
    return records


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
    """Compile for caches of `dtype`, so that the first request need not wait."""
    _compiled(dtype)


def _call(
    function: Any,
    kv_cache: torch.Tensor,
    head_size: int,
    tensors: dict[str, torch.Tensor],
    rows: np.ndarray | None = None,
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
    if rows is not None:
        call["rows"] = rows.ctypes.data
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
