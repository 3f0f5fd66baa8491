"""Compiled loops on PyTorch's own OpenMP threads, and their cache on disk.

Threads beside PyTorch's would compete with them, because they spin while they wait.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import ffi
from numba import cfunc, njit, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from vllm_avl.kernels.cpu.vectors import LANES, instruction

_openmp = ctypes.CDLL(None)
_run = _openmp.GOMP_parallel
_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_run.restype = None
# Names, not addresses: Numba keeps no function on disk that holds an address.
for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
    _address = ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value
    llvm.add_symbol(_name, _address)
_options = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
compiled = njit(**_options)
"""Compile a function that loops call."""
inlined = njit(**_options, inline="always")
"""The same, for a large function with one caller: it goes through LLVM once."""
thread_index = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
wait_for_all = types.ExternalFunction("GOMP_barrier", types.void())


@compiled
def share(size: int) -> tuple[Any, Any]:
    """First of `size` items that this thread does, and first of the next thread."""
    index, threads = np.int64(thread_index()), np.int64(num_threads())
    return size * index // threads, size * (index + 1) // threads


@intrinsic
def read(_context: Any, address: Any, dtype: Any, index: Any) -> Any:
    """The number at an index of an array; `dtype` is a Numba type."""
    number = dtype.instance_type

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        kind = context.get_value_type(number)
        start = builder.inttoptr(values[0], kind.as_pointer())
        return builder.load(builder.gep(start, [values[2]]))

    return number(types.int64, dtype, types.int64), generate


@intrinsic
def write(_context: Any, address: Any, dtype: Any, index: Any, value: Any) -> Any:
    """Write a number at an index of an array; `dtype` is a Numba type."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        start = builder.inttoptr(values[0], values[3].type.as_pointer())
        builder.store(values[3], builder.gep(start, [values[2]]))
        return context.get_dummy_value()

    number = dtype.instance_type
    return types.void(types.int64, dtype, types.int64, number), generate


@intrinsic
def copy_element(
    _context: Any, source: Any, old: Any, target: Any, new: Any, element: Any
) -> Any:
    """Copy the element at an index to an index, of the type that `element` has."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointer = values[4].type.as_pointer()
        from_ = builder.gep(builder.inttoptr(values[0], pointer), [values[1]])
        to = builder.gep(builder.inttoptr(values[2], pointer), [values[3]])
        builder.store(builder.load(from_), to)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, element), generate


@instruction(types.int64, types.int64)
def count_up(builder: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, and return what it was; of all threads one."""
    pointer = builder.inttoptr(address, ir.IntType(64).as_pointer())
    return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "acq_rel")


@cache
def _sources() -> str:
    """A name for how all of this package's compiled loops read."""
    digest = hashlib.sha256(f"{LANES}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class _Call(types.Record):
    """Arguments of a call, of a name that means the same in every process.

    Numba names records by number, in the order a process meets them, and functions by
    the types they take: a function from its disk would pass for another record's.
    """

    @classmethod
    def of(cls, dtype: np.dtype) -> _Call:
        """Make the type of a structured dtype."""
        record = numba.from_dtype(dtype)
        fields = [(name, field._asdict()) for name, field in record.fields.items()]
        return cls(fields, record.size, record.aligned)

    @property
    def mangling_args(self) -> tuple[str, tuple]:
        """Of a function's name."""
        return f"Call{hashlib.sha256(self.name.encode()).hexdigest()[:16]}", ()


register_model(_Call)(models.RecordModel)


_LINE = 64
_scratch = torch.empty(0, dtype=torch.uint8)


def scratch_of(num_bytes: int) -> int:
    """Address of memory that the next call may write, from a cache line on.

    It is kept: what is allocated anew costs as much as the work, a page at a time.
    """
    global _scratch
    if len(_scratch) < num_bytes + _LINE:
        _scratch = torch.empty(num_bytes + _LINE, dtype=torch.uint8)
    return -(-_scratch.data_ptr() // _LINE) * _LINE


def drop_scratch() -> None:
    """Give that memory back; the next call takes what it needs."""
    global _scratch
    _scratch = torch.empty(0, dtype=torch.uint8)


def in_lines(count: int) -> int:
    """`count` fp32 numbers, rounded up to whole cache lines."""
    return -(-4 * count // _LINE) * _LINE // 4


class Loop:
    """What every thread of a call does, compiled for each type of elements."""

    def __init__(
        self,
        body: Callable[[Any], None],
        fields: Sequence[str],
        reals: Sequence[str] = (),
    ) -> None:
        """Name the arguments that `body` gets a pointer to: int64, then fp32."""
        self._body, self._fields, self._reals = body, fields, reals
        self._compiled: dict[types.Type, tuple[Any, np.dtype]] = {}

    def start(self, element: types.Type) -> None:
        """Compile for caches of elements of a type, or take what is on disk."""
        if element in self._compiled:
            return
        record = self._record(element)
        signature = types.void(types.CPointer(_Call.of(record)))
        compile_it = partial(cfunc, signature, error_model="numpy")
        try:
            function = compile_it(cache=True)(self._body)
        except (RuntimeError, OSError) as error:
            # Numba finds no place to write, or the place is full.
            warnings.warn(f"compiled loops are not kept on disk: {error}", stacklevel=2)
            function = compile_it()(self._body)
        self._compiled[element] = function, record

    def run(self, element: types.Type, *arguments: float) -> None:
        """Run on every OpenMP thread; return when all are done."""
        self.start(element)
        function, record = self._compiled[element]
        call = np.array((*arguments, 0, 0), record)
        _run(function.address, call.ctypes.data, torch.get_num_threads(), 0)

    def _record(self, element: types.Type) -> np.dtype:
        """Arguments as OpenMP hands them to its threads."""
        fields: list[tuple[str, Any]] = [(name, np.int64) for name in self._fields]
        fields += [(name, np.float32) for name in self._reals]
        # Loops learn the type of elements from this field's.
        fields.append(("element", np.dtype(element.name)))
        # Looking on disk, Numba compares no more than the function's own file.
        fields.append((f"of_{_sources()}", np.int8))
        return np.dtype(fields, align=True)


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
