"""Runs Triton kernels on CPU tensors, whatever Triton was imported for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

# The interpreter imports Gluon on its first launch, and Gluon insists on JIT functions.
import triton.experimental.gluon  # noqa: F401
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

LANGUAGE = (tl, tl.core, tl.math, tl.standard)
USER = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
"""Stands for a function whose module knows the whole language."""


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Give the modules' kernels, and Triton's own functions, to its interpreter.

    TRITON_INTERPRET would have to be set before vLLM imports Triton, and every server
    that a test starts would inherit it.
    """
    with ExitStack() as stack:
        for module in (*LANGUAGE, *with_imported(modules)):
            for name, function in kernels(module):
                replaced = InterpretedFunction(function.fn)
                stack.enter_context(patch.object(module, name, replaced))
        stack.enter_context(interpreted_language())
        yield


def kernels(module: ModuleType) -> list[tuple[str, JITFunction]]:
    """Return what Triton would compile, by its name in a module."""
    return [(n, f) for n, f in vars(module).items() if isinstance(f, JITFunction)]


def with_imported(modules: Iterable[ModuleType]) -> set[ModuleType]:
    """Return modules, and those beside them from which they have functions."""
    found, new = set(), set(modules)
    while new:
        found |= new
        names = {
            name
            for module in new
            for value in vars(module).values()
            if isinstance(name := getattr(value, "__module__", None), str)
            and name.rpartition(".")[0] == module.__name__.rpartition(".")[0]
        }
        new = {sys.modules[name] for name in names} - found
    return found


@contextmanager
def interpreted_language() -> Iterator[None]:
    """Replace the language once; Triton does at every call of every function."""
    scope = interpreter._patch_lang(USER)
    nothing = interpreter._LangPatchScope()
    try:
        with patch.object(interpreter, "_patch_lang", lambda function: nothing):
            yield
    finally:
        scope.restore()
