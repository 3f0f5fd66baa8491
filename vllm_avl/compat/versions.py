"""The range of vLLM versions this was written for."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED = SpecifierSet(">=0.32,<0.34")


def mismatch() -> str | None:
    """Say that the installed vLLM is out of range, None where it is in."""
    installed = version("vllm")
    if SUPPORTED.contains(installed, prereleases=True):
        return None
    return f"vLLM {installed} is installed, and {SUPPORTED} is supported"
