"""CUDA graphs without CUDA: a tape of device work with the very tensors of the capture.

While a graph is captured, every torch operator and every Triton launch goes onto the
tape, with the tensors and numbers it got. A replay runs the tape and no Python of the
model: what a real graph would read from its static buffers is read from them here, and
what Python decided at capture time stays decided. So a back end that builds new tensors
for a step, or keeps a length in a Python number, gives wrong tokens as it would on a
GPU. Reading a tensor's value while capturing raises, as it does there.

Work that stays on the host on a GPU (numpy, plain Python) is not on the tape, but an
operator on a CPU tensor is: on the stand-in all tensors look the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

READING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
# torch has short cuts for these on CPU tensors.
READING_METHODS = (
    *("item", "tolist", "numpy"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
WITHOUT_VALUES = ("aten::empty", "aten::new_empty")

bodies: dict[str, Callable[..., Any]] = {}
"""Operators of vLLM written in Python, by name: a tape looks into them."""
counts: Counter[str] = Counter()
"""Graphs captured, and replays."""
capturing: list[Tape] = []
"""The tape that is running: none or one."""


class CaptureError(RuntimeError):
    """What a CUDA stream does not permit while it captures."""


class Tape(TorchDispatchMode):
    """Records operators and launches, and runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if name in bodies:
            with self:
                return bodies[name](*args, **kwargs)
        if name.startswith(READING):
            raise CaptureError(f"{name} is not permitted while capturing")
        outputs = func(*args, **kwargs)
        if not name.startswith(WITHOUT_VALUES):
            fresh = fresh_outputs((args, kwargs), outputs)
            self.steps.append(partial(repeat, func, args, kwargs, fresh))
        return outputs


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments or results."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def fresh_outputs(inputs: Any, outputs: Any) -> list[torch.Tensor | None]:
    """Return the outputs with memory of their own, None in place of the others."""
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors(inputs)}
    return [
        None if tensor.untyped_storage().data_ptr() in known else tensor
        for tensor in tensors(outputs)
    ]


def repeat(
    func: Callable[..., Any], args: Any, kwargs: Any, fresh: list[torch.Tensor | None]
) -> None:
    """Run an operator again, with its results where they were."""
    outputs = tensors(func(*args, **kwargs))
    for old, new in zip(fresh, outputs, strict=True):
        if old is not None:
            old.copy_(new)


class CUDAGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.tape = Tape()
        self.capture = ExitStack()

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the tape."""
        self.capture.enter_context(self.tape)
        capturing.append(self.tape)
        self.capture.callback(capturing.clear)
        for name in READING_METHODS:
            refusal = refuse(getattr(torch.Tensor, name))
            self.capture.enter_context(mock.patch.object(torch.Tensor, name, refusal))

    def capture_end(self) -> None:
        """Stop the tape."""
        self.capture.close()
        counts["captured"] += 1

    def replay(self) -> None:
        """Run the tape."""
        counts["replayed"] += 1
        with torch.inference_mode():
            for step in self.tape.steps:
                step()

    def reset(self) -> None:
        """Forget it."""
        self.tape.steps.clear()

    def pool(self) -> tuple[int, int]:
        """Return a handle: tensors on a tape keep themselves alive."""
        return (0, 0)


class graph:  # noqa: N801 - torch's name
    """Stands for the context manager `torch.cuda.graph`."""

    def __init__(self, cuda_graph: CUDAGraph, *args: Any, **kwargs: Any) -> None:
        self.cuda_graph = cuda_graph

    def __enter__(self) -> None:
        self.cuda_graph.capture_begin()

    def __exit__(self, *error: Any) -> None:
        self.cuda_graph.capture_end()


def install() -> None:
    """Put the tape where vLLM and Triton meet CUDA graphs; before vLLM's layers."""
    torch.cuda.CUDAGraph = CUDAGraph
    torch.cuda.graph = graph
    torch.cuda.graph_pool_handle = lambda: (0, 0)
    torch.cuda.is_current_stream_capturing = lambda: bool(capturing)
    note_python_operators()
    record_launches()


def note_python_operators() -> None:
    """Learn the Python bodies of vLLM's operators as they are registered."""
    from vllm.utils import torch_utils

    register = torch_utils.direct_register_custom_op

    @wraps(register)
    def noting(op_name: str, op_func: Callable[..., Any], *args: Any, **kwargs: Any):
        bodies[f"vllm::{op_name}"] = op_func
        return register(op_name, op_func, *args, **kwargs)

    torch_utils.direct_register_custom_op = noting


def record_launches() -> None:
    """Put interpreted Triton launches onto the tape, not the torch inside them."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    @wraps(run)
    def recorded(self: Any, *args: Any, **kwargs: Any):
        if not capturing:
            return run(self, *args, **kwargs)
        (tape,) = capturing
        tape.steps.append(partial(run, self, *args, **kwargs))
        capturing.clear()
        try:
            with _disable_current_modes():
                return run(self, *args, **kwargs)
        finally:
            capturing.append(tape)

    InterpretedFunction.run = recorded


def refuse(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that reads a tensor: not while capturing."""

    @wraps(method)
    def reading(self: torch.Tensor, *args: Any, **kwargs: Any):
        if capturing:
            name = method.__name__
            raise CaptureError(f"Tensor.{name} is not permitted while capturing")
        return method(self, *args, **kwargs)

    return reading
