"""Triton without a GPU: kernels interpreted, or compiled for sm_90 and not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver, jit

from benchmarks.testing.interpreted import interpreted_language

HOPPER = GPUTarget("cuda", 90, 32)

language = ExitStack()
"""The interpreter's, for as long as this process lives."""
compiled: dict[str, set[str]] = defaultdict(set)
"""Hashes of the variants compiled, by kernel."""
failed: dict[str, str] = {}
"""The first error of each kernel that does not compile."""


class Driver:
    """Answers what Triton asks its driver before a launch."""

    get_current_target = staticmethod(lambda: HOPPER)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cuda)
    map_python_to_cpp_type = staticmethod(nvidia.ty_to_cpp)


def install(compile_only: bool) -> None:
    """Make Triton usable; `compile_only` for compiling what is launched."""
    # vLLM's HAS_TRITON wants exactly one active driver.
    nvidia.CudaDriver.is_active = staticmethod(lambda: True)
    # The real driver would load libcuda.
    driver.set_active(Driver())
    if compile_only:
        compile_launch.original = jit.JITFunction.run
        jit.JITFunction.run = compile_launch
        clear_new_tensors()
    elif not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton was imported before TRITON_INTERPRET was set")
    else:
        language.enter_context(interpreted_language())


def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any):
    """Stand for `JITFunction.run`: compile with the launch's arguments, run nothing."""
    name = f"{self.fn.__module__}.{self.fn.__qualname__}"
    try:
        run = compile_launch.original
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    except Exception as error:  # noqa: BLE001 - the report names it, the run goes on
        failed.setdefault(name, repr(error)[-1000:])
        return None
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    compiled[name].add(kernel.hash)
    return kernel


def clear_new_tensors() -> None:
    """Zero what kernels would have written: torch takes some of it for indices."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        setattr(owner, name, zeroed(getattr(owner, name)))


def zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a function that returns uninitialised memory."""
    return lambda *args, **kwargs: make(*args, **kwargs).zero_()


def report() -> dict[str, Any]:
    """Return the number of variants compiled by kernel, and the errors."""
    variants = {name: len(hashes) for name, hashes in sorted(compiled.items())}
    return {"compiled": variants, "failed": dict(sorted(failed.items()))}
