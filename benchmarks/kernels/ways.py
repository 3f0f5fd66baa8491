"""One way of doing a piece of work: what is called, and what its result must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

CHECKED_REQUESTS = 4
"""Of a batch, compared with the oracle: the first."""
FAILURES = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    NotImplementedError,
    TritonError,
)
"""What somebody else's kernel raises where it cannot serve; ours may raise nothing."""


@dataclass(frozen=True)
class Check:
    """A result with an error budget: twice what eager code errs in the same dtype."""

    what: str
    result: Callable[[], torch.Tensor]
    exact: torch.Tensor
    """In fp64."""
    eager: torch.Tensor

    def failure(self) -> str | None:
        """Compare, print what was found and return what is wrong with it."""
        exact, result = self.exact, self.result()
        if result.shape != exact.shape:
            return f"{self.what} has shape {result.shape}, not {exact.shape}"
        ulp = torch.finfo(self.eager.dtype).eps * exact.abs().max()
        budget = 2 * (self.eager.double() - exact).abs().max() + ulp
        error = (result.double() - exact).abs().max()
        found = f"{self.what}: error {error:.1e} of {budget:.1e}"
        # Not `error > budget`: NaN must fail.
        if not error <= budget:
            return found
        print(f"checked {found}")
        return None


@dataclass(frozen=True)
class Bits:
    """A result that must be the expected one bit by bit."""

    what: str
    result: Callable[[], torch.Tensor]
    expected: torch.Tensor

    def failure(self) -> str | None:
        """Compare, print what was found and return what is wrong with it."""
        if not torch.equal(self.result(), self.expected):
            return f"{self.what}: other bits"
        print(f"checked {self.what}: same bits")
        return None


@dataclass(frozen=True)
class Way:
    """A way of doing some work, on several copies of the data.

    Attributes:
        labels: CSV columns that tell it from other ways.
        calls: the same work, each call on memory of its own.
        num_bytes: that one call must move at least.
        checks: made before anything is timed.
        required: ours; a wrong result ends the run.
        baseline: name under which the others of its group are compared with it.
        group: of ways that can be compared.
    """

    labels: Mapping[str, object]
    calls: Sequence[Callable[[], Any]]
    num_bytes: int
    checks: Sequence[Check | Bits] = ()
    required: bool = False
    baseline: str | None = None
    group: str = ""

    @property
    def name(self) -> str:
        """All its labels."""
        return " ".join(str(value) for value in self.labels.values() if value != "")


@dataclass
class Workload:
    """All ways of one case, and why some are missing."""

    ways: list[Way] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Reason of each baseline that is not measured, by its name."""

    def attempt(self, name: str, build: Callable[[], Way]) -> None:
        """Add a baseline, or note why it is not there."""
        try:
            self.ways.append(build())
        except FAILURES as error:
            self.missing[name] = reason(error)

    def keep_correct(self) -> None:
        """Check all results; leave out the baselines that are wrong or fail.

        Raises:
            SystemExit: our own result is wrong.
        """
        checked = []
        for way in self.ways:
            why = first_failure(way)
            if why is None:
                checked.append(way)
            elif way.required:
                raise SystemExit(f"{way.name}: {why}: nothing was timed")
            else:
                self.missing[way.name] = why
        self.ways = checked


def first_failure(way: Way) -> str | None:
    """Return why a way must not be timed; None where all its checks hold."""
    try:
        return next((why for check in way.checks if (why := check.failure())), None)
    except FAILURES as error:
        if way.required:
            raise
        return reason(error)


def on_copies(call: Callable[[Any], Any], copies: Iterable[Any]) -> list[Callable]:
    """Return one call a copy of the data."""
    return [partial(call, copy) for copy in copies]


def reason(error: BaseException) -> str:
    """Return the first line of an error, behind its class where it has no text."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
