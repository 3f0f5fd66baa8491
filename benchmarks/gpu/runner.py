"""Runs steps one after another, each with its own limit, whatever became of others.

A step is a process with a log. It may start more processes and even leave them behind
in sessions of their own, as a killed benchmark leaves its server: this process adopts
them all (Linux) and ends them before the next step, which needs the whole GPU.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 12.0
"""Between asking a step to stop and ending all of its processes."""
LEAST_SECONDS = 10.0
"""With less left no step begins."""
SAY_SECONDS = 20.0
POLL_SECONDS = 0.2
TIMED_OUT = 124
NO_FIGURE = (OSError, LookupError, ValueError, TypeError, ArithmeticError)
"""What reading a figure out of results that are not there can raise."""

Headline = Callable[[str], str]
"""Says what a step's log comes to, or what it wrote."""


@dataclass(frozen=True)
class Step:
    """A command, how long it may take, and what its result is called in a line."""

    name: str
    command: Sequence[str]
    seconds: float
    headline: Headline
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step; no rc if it was not started."""

    name: str
    rc: int | None
    seconds: float
    headline: str

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.rc is None:
            return "not started"
        return {0: "ok", TIMED_OUT: "timed out"}.get(self.rc, "failed")


class Runner:
    """Runs steps until its time is over, and says what happens while it does."""

    def __init__(
        self,
        folder: Path,
        seconds: float,
        say: Callable[[str], None],
        *,
        ended: Callable[[Outcome, Path], None],
    ) -> None:
        """Let steps work in `folder`, for `seconds` from now.

        Args:
            folder: of the logs, and the steps' working directory.
            seconds: for all steps together.
            say: takes progress lines.
            ended: takes each step's outcome and log at once.
        """
        self._folder, self._say, self._ended = folder, say, ended
        self._deadline = time.monotonic() + seconds
        adopt_orphans()

    @property
    def left(self) -> float:
        """Seconds."""
        return self._deadline - time.monotonic()

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run all steps; one that fails or takes too long does not stop the others."""
        outcomes = []
        for number, step in enumerate(steps, 1):
            log = self._folder / f"{number:02}-{step.name}.log"
            head = f"[{number}/{len(steps)}] {step.name}"
            outcome = self._run(step, log, head)
            figure = f": {outcome.headline}" if outcome.headline else ""
            self._say(f"{head}: {outcome.verdict}, {outcome.seconds:.0f} s{figure}")
            outcomes.append(outcome)
            self._ended(outcome, log)
        return outcomes

    def _run(self, step: Step, log: Path, head: str) -> Outcome:
        limit = min(step.seconds, self.left - STOP_SECONDS)
        if limit < LEAST_SECONDS:
            log.write_text("not started: no time was left\n")
            return Outcome(step.name, None, 0.0, "no time was left")
        self._say(f"{head}: up to {limit:.0f} s; {self.left:.0f} s left")
        started = time.monotonic()
        rc = self._wait(step, log, limit)
        seconds = time.monotonic() - started
        return Outcome(step.name, rc, seconds, headline(step, log))

    def _wait(self, step: Step, log: Path, limit: float) -> int:
        """Return the step's exit status when none of its processes is left."""
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=self._folder,
                    env={**os.environ, **step.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"{error}\n".encode())
                return 127
            try:
                return self._watch(process, log, limit)
            finally:
                end_descendants()
                process.wait()

    def _watch(self, process: subprocess.Popen[bytes], log: Path, limit: float) -> int:
        started = said = time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if now - started > limit:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                return TIMED_OUT
            if now - said > SAY_SECONDS:
                said = now
                self._say(f"    {now - started:.0f} s: {last_line(log)}")
            time.sleep(POLL_SECONDS)
        return process.returncode


def headline(step: Step, log: Path) -> str:
    """Return the step's result in a line, or why there is none."""
    text = log.read_text(errors="replace")
    try:
        return step.headline(text)
    except NO_FIGURE as error:
        return f"no figure ({type(error).__name__}: {error}); {last_line(log)}"


def last_line(log: Path) -> str:
    """Return the log's last line that has something in it, shortened."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "")


def adopt_orphans() -> None:
    """Become the parent of whatever a child of ours leaves behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this system cannot adopt orphans")


def end_descendants(seconds: float = STOP_SECONDS) -> None:
    """Kill all processes below this one, until none is left or time is over."""
    end = time.monotonic() + seconds
    while (pids := list(descendants(os.getpid()))) and time.monotonic() < end:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL_SECONDS / 4)


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes below `pid`, zombies included."""
    parents = dict(process_parents())
    found = {pid}
    while more := {child for child in parents if parents[child] in found} - found:
        found |= more
    yield from found - {pid}


def process_parents() -> Iterator[tuple[int, int]]:
    """Yield (pid, parent) of every process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name in parentheses may have anything in it.
            fields = stat.read_text().rpartition(")")[2].split()
            yield int(stat.parent.name), int(fields[1])
