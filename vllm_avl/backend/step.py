"""The adaptive requests a worker holds, and the step it is executing.

A metadata builder is not told which requests its batch rows belong to; the worker
subclass in compat opens a `Step` around each forward pass instead. Outside of one
(profiling, warm-up) batches are dummies and nothing is adaptive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_avl.backend.request import RequestState
from vllm_avl.backend.view import StepView
from vllm_avl.plan import Plan


@dataclass
class WorkerRequests:
    """Adaptive requests that a worker holds, and some that it remembers."""

    num_remembered: int = 0
    """Finished requests to remember."""
    running: dict[str, RequestState] = field(default_factory=dict)
    finished: deque[tuple[str, RequestState]] = field(init=False)
    """Oldest first."""

    def __post_init__(self) -> None:
        self.finished = deque(maxlen=self.num_remembered)

    def update(
        self,
        finished: Iterable[str],
        preempted: Iterable[str],
        received: Mapping[str, Plan],
    ) -> None:
        """Drop finished and preempted requests, then take what came with the step."""
        for request_id in finished:
            state = self.running.pop(request_id, None)
            if state is not None and self.num_remembered:
                state.finish()
                self.finished.append((request_id, state))
        for request_id in preempted:
            self.running.pop(request_id, None)
        self.running |= {name: RequestState(plan) for name, plan in received.items()}

    def find(self, request_id: str) -> RequestState | None:
        """Return a running or remembered request; the latest of several by that id."""
        return self.running.get(request_id) or dict(self.finished).get(request_id)


@dataclass
class Step:
    """One forward pass: requests, and a look at the batch's ids in row order."""

    requests: Mapping[str, RequestState]
    request_ids: Callable[[], Sequence[str]]
    view: StepView | None = None
    """Made by the first metadata builder that asks, for all of them."""

    def row_states(self) -> list[tuple[int, RequestState]]:
        """Batch rows that are adaptive."""
        return [
            (row, self.requests[request_id])
            for row, request_id in enumerate(self.request_ids())
            if request_id in self.requests
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
