"""Triton without a GPU: kernels interpreted, or compiled for sm_90 and not run."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver, interpreter, jit

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
        executor = interpreter.GridExecutor
        executor.__call__ = with_given_arguments(executor.__call__)
        interpreter.FunctionRewriter.ast_transformer = Loops()
        interpreter.InterpreterBuilder.create_splat = splat


class Loops(interpreter.ASTTransformer):
    """Makes the variable of a loop a tensor, as it is where a kernel is compiled."""

    def visit_For(self, node: ast.For) -> ast.AST:  # noqa: N802 - the name of a node
        """Convert what is counted, if that is not unrolled."""
        node = self.generic_visit(node)
        if "static_range" not in ast.unparse(node.iter):
            names = [ast.Name(name, ast.Load()) for name in ("map", "_implicit_cvt")]
            node.iter = ast.Call(names[0], [names[1], node.iter], [])
        return node


def splat(self: Any, ret_ty: Any, arg: Any) -> interpreter.TensorHandle:
    """Stand for the interpreter's, which makes integers of two compared scalars."""
    data = np.full(ret_ty.shape, arg.data, arg.data.dtype)
    return interpreter.TensorHandle(data, arg.dtype.scalar)


def with_given_arguments(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an interpreted launch: a grid may look at and replace what it was given."""

    @wraps(launch)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(self.fn).parameters
        known = {name: value for name, value in kwargs.items() if name in names}
        given = inspect.getcallargs(self.fn, *args, **known)
        if callable(self.grid):
            self.grid = self.grid(given)
        return launch(self, **given)

    return call


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
