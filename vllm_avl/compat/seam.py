"""What a place in vLLM without an extension point is recorded as.

Every patch and every overridden private method is such a record: what it targets, the
parameters it was written for, why it exists, and what would make it go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Seam:
    """A function of vLLM that a subclass of ours overrides or calls."""

    owner: type | ModuleType
    name: str
    parameters: tuple[str, ...]
    why: str
    also: tuple[tuple[str, ...], ...] = field(default=(), kw_only=True)
    """Parameters in other supported versions of vLLM, all of which ours takes."""

    def mismatch(self) -> str | None:
        """Say how the installed vLLM differs, None where it fits."""
        target = f"{self.owner.__name__}.{self.name}"
        function = getattr(self.owner, self.name, None)
        if function is None:
            return f"{target} is gone"
        found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
        accepted = (self.parameters, *self.also)
        if found not in accepted:
            return f"{target} takes {found}, not {' or '.join(map(str, accepted))}"
        return None


@dataclass(frozen=True)
class Patch(Seam):
    """A function of vLLM that we wrap in place."""

    wrap: Callable[[Callable[..., Any]], Any]
    until: str

    def apply(self) -> None:
        """Wrap the function, whether it is a class method or a plain one."""
        setattr(self.owner, self.name, self.wrap(getattr(self.owner, self.name)))


def unmet_by(ours: Iterable[type]) -> list[str]:
    """Say which methods the installed vLLM asks for that our classes lack.

    Python itself would say so only where one is made, in the middle of a step.
    """
    return [
        f"{cls.__name__} lacks {', '.join(sorted(missing))}"
        for cls in ours
        if (missing := vars(cls).get("__abstractmethods__"))
    ]


def mismatches_of(seams: Iterable[Seam]) -> list[str]:
    """Say where the installed vLLM differs from what `seams` were written for."""
    found = [seam.mismatch() for seam in seams]
    return [mismatch for mismatch in found if mismatch is not None]
