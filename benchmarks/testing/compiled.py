"""Compiles Triton kernels for GPUs that are not there, and reads the machine code.

Run a launcher under `compile_launches`, its tensors on PyTorch's "meta" device: what it
would launch is compiled as it would be, and reported on.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

Launch = Callable[[], object]
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)\.E(\S*)")
WIDTH = re.compile(r"\.[US]?(8|16|32|64|128|256)\b")


@dataclass(frozen=True)
class Machine:
    """What one kernel became.

    Attributes:
        kernel: its name.
        arch: compute capability, 90 for sm_90.
        registers: of a thread.
        stack: bytes of a thread, 0 unless registers were spilled.
        shared: bytes of a program.
        loads: global load instructions by the bytes a thread loads.
        stores: as loads.
        instructions: the machine code, a line an instruction.
        ttgir: Triton's last own form of it.
    """

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    instructions: list[str]
    ttgir: str


def compile_launches(launches: Sequence[tuple[Launch, int]]) -> list[list[Machine]]:
    """Compile what each launcher launches, for the architecture beside it.

    In fresh processes: Triton's interpreter leaves its marks on the compiler. So the
    launchers must be picklable, and may be partials.
    """
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            return list(pool.map(_compile_launch, *zip(*launches, strict=True)))


def variants(launch: Launch) -> set[str]:
    """Name what a launcher would have compiled; equal names are compiled once."""
    return {
        " ".join([call[0].__name__, *map(str, _specialise(*call))])
        for call in _calls(launch)
    }


def _calls(launch: Launch) -> list[tuple[JITFunction, tuple, dict]]:
    calls: list[tuple[JITFunction, tuple, dict]] = []

    def note(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        calls.append((kernel, args, kwargs))

    with patch.object(JITFunction, "run", note):
        launch()
    return calls


def _compile_launch(launch: Launch, arch: int) -> list[Machine]:
    target = GPUTarget("cuda", arch, 32)
    machines = []
    for kernel, args, kwargs in _calls(launch):
        *specialised, options = _specialise(kernel, args, kwargs)
        source = ASTSource(kernel, *specialised)
        compiled = triton.compile(source, target=target, options=options)
        machines.append(_read(kernel.__name__, target.arch, compiled))
    return machines


def _specialise(
    kernel: JITFunction, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict, dict, dict, dict]:
    """Return signature, constants, attributes and options of a launch's variant."""
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: kwargs[name] for name in names if name in kwargs}
    given = {name: kwargs[name] for name in kwargs if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **given)
    bound.apply_defaults()
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(bound.arguments.items()):
        param = kernel.params[place]
        by_value = not param.do_not_specialize
        by_alignment = by_value and not param.do_not_specialize_on_alignment
        signature[name] = "constexpr" if param.is_constexpr else _type(value, by_value)
        if signature[name] == "constexpr":
            constants[(place,)] = value
        elif by_alignment and _is_aligned(value):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def _type(value: Any, by_value: bool) -> str:
    """How a launch at run time would specialise an argument."""
    if isinstance(value, torch.Tensor):
        return "*" + canonicalize_dtype(value.dtype)
    if isinstance(value, float):
        return "fp32"
    if value is None or (by_value and value == 1):
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _read(kernel: str, arch: int, compiled: Any) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True)
    usage = {
        name: int(re.search(rf"{name}:(\d+)", text.stdout)[1])  # type: ignore[index]
        for name in ("REG", "STACK")
    }
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text.stdout, re.MULTILINE)
    loads, stores = Counter[int](), Counter[int]()
    for operation, modifiers in ACCESS.findall("\n".join(code)):
        width = WIDTH.search(modifiers)
        width_in_bytes = int(width[1]) // 8 if width else 4
        (stores if operation == "STG" else loads)[width_in_bytes] += 1
    return Machine(
        kernel,
        arch,
        usage["REG"],
        usage["STACK"],
        compiled.metadata.shared,
        loads,
        stores,
        code,
        compiled.asm["ttgir"],
    )
