"""The plans a worker holds, and the step it is executing.

A metadata builder is not told which requests its batch rows belong to; the worker
subclass in compat opens a `Step` around each forward pass instead. Outside of one
(profiling, warm-up) batches are dummies and nothing is adaptive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_avl.plan import Plan


@dataclass
class WorkerPlans:
    """Plans of the requests a worker holds, by request id."""

    plans: dict[str, Plan] = field(default_factory=dict)

    def update(self, dropped: Iterable[str], received: Mapping[str, Plan]) -> None:
        """Drop finished and preempted requests, then take what came with the step."""
        for request_id in dropped:
            self.plans.pop(request_id, None)
        self.plans.update(received)


@dataclass(frozen=True)
class Step:
    """One forward pass: `plans`, and a look at the batch's request ids in row order."""

    plans: Mapping[str, Plan]
    request_ids: Callable[[], Sequence[str]]

    def row_plans(self) -> list[tuple[int, Plan]]:
        """Batch rows that have a plan."""
        return [
            (row, self.plans[request_id])
            for row, request_id in enumerate(self.request_ids())
            if request_id in self.plans
        ]


_current: ContextVar[Step | None] = ContextVar("avl_step", default=None)


@contextmanager
def executing(step: Step) -> Iterator[None]:
    """Make `step` the current one."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def current_step() -> Step | None:
    """Return the step being executed, None in a dummy run."""
    return _current.get()
