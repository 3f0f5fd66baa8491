"""The adaptive requests a worker holds, and the step it is executing.

A metadata builder is not told which requests its batch rows belong to; the worker
subclass in compat opens a `Step` around each forward pass instead. Outside of one
(profiling, warm-up) batches are dummies and nothing is adaptive.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import key
from vllm_avl.plan import Compaction
from vllm_avl.worker.request import Kernels, RequestState
from vllm_avl.worker.seats import Seats, SeatTable

Numbers = npt.NDArray[np.int64]


class WorkerRequests:
    """Adaptive requests that a worker holds, and some that it remembers."""

    def __init__(
        self,
        num_remembered: int = 0,
        device: str | torch.device = "cpu",
        kernels: Kernels | None = None,
        block_size: int = 1,
    ) -> None:
        """Hold nothing yet.

        Args:
            num_remembered: finished requests to remember.
            device: of the cache.
            kernels: what those of the device can do.
            block_size: the block manager's.
        """
        self.num_remembered = num_remembered
        self.block_size = block_size
        self.kernels = kernels or Kernels()
        self.counts = Counts()
        self.seats = SeatTable(device)
        self.running: dict[str, RequestState] = {}
        self._seat_of: dict[str, int] = {}
        self.finished: deque[tuple[str, RequestState]] = deque(maxlen=num_remembered)
        """Oldest first."""

    def update(
        self,
        finished: Iterable[str],
        preempted: Iterable[str],
        received: Mapping[str, Compaction],
    ) -> None:
        """Drop finished and preempted requests, then take what came with the step."""
        for request_id in finished:
            state = self._drop(request_id)
            if state is not None and self.num_remembered:
                self.finished.append((request_id, state))
        for request_id in preempted:
            self._drop(request_id)
        for request_id, compaction in received.items():
            self._drop(request_id)
            state = RequestState(compaction, self.seats, self.counts, self.kernels)
            self.running[request_id] = state
            self._seat_of[request_id] = state.seat

    def take_back(self, rejected: Mapping[str, int]) -> None:
        """Let requests be shorter again by the drafts that were not accepted.

        Args:
            rejected: tokens of the last step, by request id.
        """
        for request_id, num_tokens in rejected.items():
            seat = self._seat_of.get(request_id)
            if seat is not None:
                self.seats.records["num_tokens"][seat] -= num_tokens

    def _drop(self, request_id: str) -> RequestState | None:
        state = self.running.pop(request_id, None)
        if state is not None:
            del self._seat_of[request_id]
            state.finish()
        return state

    def begin(
        self,
        computed: Mapping[str, int],
        scheduled: Mapping[str, int],
        row_ids: Callable[[], Sequence[str]],
        drafts: Mapping[str, int] | None = None,
    ) -> Step | None:
        """Return what the requests do in a step; None where none is adaptive.

        Args:
            computed: tokens computed before the step, by request id.
            scheduled: tokens of the step.
            row_ids: request ids in the order of the batch's rows, once it is known.
            drafts: of the step's tokens, those that may be rejected.
        """
        seat_of = self._seat_of
        names = [name for name in scheduled if name in seat_of] if seat_of else ()
        if not names:
            return None
        before = np.array([computed[name] for name in names], np.int64)
        return Step(
            self,
            {name: index for index, name in enumerate(names)},
            np.array([seat_of[name] for name in names], np.int64),
            before,
            before + np.array([scheduled[name] for name in names], np.int64),
            np.array([drafts.get(name, 0) for name in names], np.int64)
            if drafts
            else np.zeros(len(names), np.int64),
            row_ids,
        )

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
            if request_id == name:
                return state
        for name, state in self.known():
            if request_id == name.rpartition("-")[0]:
                return state
        return None


@dataclass
class Step:
    """One forward pass: what its adaptive requests read and do."""

    requests: WorkerRequests
    index: Mapping[str, int]
    """Where a request stands in the arrays, by id."""
    seats: Seats
    """[num_adaptive]."""
    num_computed: Numbers
    """[num_adaptive] tokens before the step."""
    num_tokens: Numbers
    """[num_adaptive] tokens after it, drafts among them."""
    num_drafts: Numbers
    """[num_adaptive] of its tokens, the last ones, that may be rejected."""
    row_ids: Callable[[], Sequence[str]]
    """Request ids in the order of the batch's rows; runner V2 sets it."""
    num_entered: torch.Tensor | None = None
    """[1] int32 on the device, where kernels add the rows that enter core; None where
    the step chooses no core in kernels."""
    num_behind: int = 0
    """Tokens that stand behind those of the step, in each row."""
    is_drafter: bool = False
    """Whether the layers are a drafter's."""
    _rows: StepRows | None = None

    def __post_init__(self) -> None:
        self.of = of = self.requests.seats.records[self.seats]
        """[num_adaptive] of `seats.SEAT`."""
        self.num_certain = self.num_tokens - self.num_drafts
        """[num_adaptive] tokens after it whatever becomes of the drafts."""
        self.is_decode = self.num_certain - self.num_computed == 1
        self.ends_prompt = self.num_computed < of["num_prompt"]
        answers = ~self.ends_prompt
        step = self.num_computed - of["num_prompt"] + 1
        interval = of["interval"]
        last = of["num_certain"]
        num_accepted = np.where(last > 0, self.num_computed - last, 0)
        # Accepted drafts may have passed over a multiple. Several certain tokens of an
        # answer are a replay: one scoring behind it.
        due = (step % np.maximum(interval, 1) <= num_accepted) | ~self.is_decode
        self.reads_all = (interval == 0) | due
        self.refreshes = answers & (interval > 0) & due & of["is_scored"]
        self.in_pass = self.refreshes & self.is_decode & of["in_pass"]
        self.ages = self.num_certain >= of["next_aging"]
        self.has_python = (
            self.ends_prompt | (self.refreshes & ~self.in_pass) | self.ages
        )

    @property
    def has_work(self) -> bool:
        """Whether a full graph could not serve the step."""
        return bool((self.has_python | ~self.of["in_graph"]).any())

    @cached_property
    def num_selections(self) -> int:
        """Requests whose core is selected anew."""
        return int((self.refreshes & self.of["has_core"]).sum())

    def state(self, index: int) -> RequestState:
        """Return the request that stands at `index` in the arrays."""
        return self._states[index]

    @cached_property
    def _states(self) -> list[RequestState]:
        return [self.requests.running[name] for name in self.index]

    def repeated(self, num_behind: int) -> Step:
        """The step as a drafter's first pass repeats it.

        Args:
            num_behind: tokens that it has computed behind each row's: a draft model
                takes in the one that has been sampled, where others are shifted by it.
        """
        step = copy.copy(self)
        step.num_behind, step.is_drafter, step._rows = num_behind, True, None
        return step

    @cached_property
    def continued(self) -> Step:
        """The step as a drafter goes on behind it: all prompts have ended."""
        step = Step(
            self.requests,
            self.index,
            self.seats,
            self.num_tokens,
            self.num_tokens + 1,
            np.zeros_like(self.num_drafts),
            self.row_ids,
        )
        if self._rows is not None:
            # They are the same.
            step._rows = StepRows(step, self._rows.index)
        return step

    def end(self) -> None:
        """Note what the step did, for those that follow."""
        records = self.requests.seats.records
        records["num_tokens"][self.seats] = self.num_tokens
        has_drafts = self.num_drafts > 0
        records["num_certain"][self.seats] = np.where(has_drafts, self.num_certain, 0)
        records["num_refreshes"][self.seats] += self.refreshes
        if self.num_selections:
            self.requests.counts.count(key("refreshes"), self.num_selections)
        if self.num_entered is not None:
            # A copy: the next step adds anew.
            entered = self.num_entered.clone()
            self.requests.counts.count(key("core_rows_entered"), entered)
            self.num_entered.zero_()
        for index in np.flatnonzero(self.ages).tolist():
            self.state(index).plan_aging(int(self.num_certain[index]))
        for index in np.flatnonzero(self.in_pass).tolist():
            self.state(index).note_core(int(self.num_certain[index]))

    def rows(self) -> StepRows:
        """Return the step in the order of the batch's rows; made once."""
        if self._rows is None:
            places = [self.index.get(name, -1) for name in self.row_ids()]
            index = np.array(places, np.int64)
            self._rows = StepRows(self, index)
        return self._rows


@dataclass
class StepRows:
    """A step's arrays in the order of the batch's rows."""

    step: Step
    index: Numbers
    """[num_rows] where a row stands in the step's arrays; -1 where it is stock's."""

    def __post_init__(self) -> None:
        step, index = self.step, self.index
        self.is_ours = index >= 0
        places = np.arange(len(step.seats))
        self._is_whole = len(index) == len(places) and bool((index == places).all())
        self.seats = self._pick(step.seats)
        answers = self.is_answer = self.is_ours & ~self._pick(step.ends_prompt)
        of = self.of = self._pick(step.of)
        self.first_block = np.where(answers, of["first_block"], 0)
        """[num_rows] blocks of the runner's table in front of the stored ones."""
        self.num_private = np.where(answers, of["num_private"], 0)
        """[num_rows] blocks behind those in place of which private ones stand."""
        self.refreshes = answers & self._pick(step.refreshes)
        self.reads_all = self._pick(step.reads_all)
        decodes = answers & self._pick(step.is_decode)
        self.num_drafts = self._pick(step.num_drafts)
        self.is_attended = decodes & of["has_core"] | answers & of["shares"]
        """[num_rows] rows that our kernel attends."""
        if step.requests.kernels.attend_scored:
            self.is_attended |= decodes & self.refreshes
        self.in_pass = self.is_ours & self._pick(step.in_pass)

    def _pick(self, values: npt.NDArray) -> npt.NDArray:
        return values if self._is_whole else values[self.index]

    @cached_property
    def with_python(self) -> list[tuple[int, int]]:
        """`(row, index)` of the rows for which Python has work after the attention."""
        has_python = self.is_ours & self._pick(self.step.has_python)
        rows = np.flatnonzero(has_python)
        return list(zip(rows.tolist(), self.index[rows].tolist(), strict=True))


_current: ContextVar[Step | None] = ContextVar("avl_step", default=None)


@contextmanager
def executing(step: Step | None) -> Iterator[None]:
    """Make `step` the current one."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def drafting(draft_index: int, num_behind: int = 0) -> AbstractContextManager[None]:
    """Make the current step what a pass of a drafter's layers is part of.

    The first pass is over the step's tokens, and works as the step does; those behind
    it are a token each, behind what the first has stored.

    Args:
        draft_index: 0 for the first pass.
        num_behind: see `Step.repeated`.
    """
    step = current_step()
    if step is not None:
        step = step.continued if draft_index else step.repeated(num_behind)
    return executing(step)


def current_step() -> Step | None:
    """Return the step being executed, None where nothing is adaptive."""
    return _current.get()
