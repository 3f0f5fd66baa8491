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

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_avl.backend.request import RequestState, Turn
from vllm_avl.backend.view import StepView, make_view
from vllm_avl.metrics.counts import Counts
from vllm_avl.plan import Plan


@dataclass
class WorkerRequests:
    """Adaptive requests that a worker holds, and some that it remembers."""

    num_remembered: int = 0
    """Finished requests to remember."""
    device: str | torch.device = "cpu"
    """Of the cache."""
    counts: Counts = field(default_factory=Counts)
    """What was done for all requests."""
    gather_below: int = 0
    """Refresh interval from which on the executor `auto` packs core."""
    has_ranking_kernels: bool = False
    """Whether the device ranks rows in kernels of ours."""
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
        self.running |= {
            name: RequestState(
                plan,
                self.device,
                self.counts,
                self.gather_below,
                self.has_ranking_kernels,
            )
            for name, plan in received.items()
        }

    def turns(self, spans: Iterable[tuple[str, int, int]]) -> dict[str, Turn]:
        """Pick the adaptive of a step's `(id, tokens before, tokens after)`."""
        if not self.running:
            return {}
        return {
            name: Turn(self.running[name], before, after)
            for name, before, after in spans
            if name in self.running
        }

    def known(self) -> Iterator[tuple[str, RequestState]]:
        """Yield running and then remembered requests by id, the newest first."""
        yield from reversed(self.running.items())
        yield from reversed(self.finished)

    def find(self, request_id: str) -> RequestState | None:
        """Return a running or remembered request; the latest of several.

        Args:
            request_id: the engine's, or the one its answer carries, to which the
                engine has added a suffix.
        """
        for name, state in self.known():
            if request_id in (name, name.rpartition("-")[0]):
                return state
        return None


@dataclass
class Step:
    """One forward pass: its adaptive requests, and which rows of the batch they are."""

    turns: Mapping[str, Turn]
    """By request id."""
    row_ids: Callable[[CommonAttentionMetadata], Sequence[str]]
    """Request ids in the order of the batch's rows."""
    num_entered: torch.Tensor | None = None
    """[1] int32 on the device, where kernels add the rows that enter core; None where
    the step chooses no core in kernels."""
    _view: StepView | None = None

    @property
    def has_work(self) -> bool:
        """Whether any request has work that only Python can do."""
        return any(turn.has_work for turn in self.turns.values())

    def view(
        self, common: CommonAttentionMetadata, block_size: int, *, fuses_scores: bool
    ) -> StepView:
        """Return what the step reads; made once, for all metadata builders."""
        if self._view is None:
            self._view = make_view(
                [self.turns.get(name) for name in self.row_ids(common)],
                common.block_table_tensor,
                common.query_start_loc_cpu.tolist(),
                block_size,
                fuses_scores,
            )
        return self._view


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
