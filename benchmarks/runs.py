"""What a workload did on an engine, and the columns that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import ratios, spread


@dataclass
class Run:
    """What one workload did on one engine."""

    outputs: dict[str, list[int]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    step_cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of this process, all threads: what a busy machine leaves alone."""
    prompt_step: list[bool] = field(default_factory=list)
    """Whether the step computed prompt tokens."""
    running: list[int] = field(default_factory=list)
    """Requests that generate a token, by step."""
    pool_use: list[float] = field(default_factory=list)
    preemptions: int = 0
    adapted: set[str] = field(default_factory=set)
    """Requests that were compacted."""
    front_end_seconds: float = 0.0
    """Time to take the requests in; no step's time has any of it."""
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    cached_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each prompt that its first try found in the prefix cache."""

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(self.step_seconds)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all steps."""
        return sum(self.step_cpu_seconds)

    @property
    def hit_rate(self) -> float:
        """Part of the prompts' tokens that the prefix cache had."""
        return sum(self.cached_tokens.values()) / sum(self.prompt_tokens.values())

    def holds_less_than(self, other: Run) -> bool:
        """Whether fewer blocks were held at the end; cached ones nobody holds."""
        return self.pool_use[-1] < other.pool_use[-1]

    @property
    def first_token_seconds(self) -> float:
        """Time of the steps up to the first token of any request."""
        return sum(self.step_seconds[: self._num_first_steps])

    @property
    def first_token_cpu_seconds(self) -> float:
        """Processor time of the same steps."""
        return sum(self.step_cpu_seconds[: self._num_first_steps])

    @property
    def _num_first_steps(self) -> int:
        return 1 + next(step for step, count in enumerate(self.running) if count)

    @property
    def output_tokens(self) -> int:
        """Tokens generated for all requests."""
        return sum(map(len, self.outputs.values()))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole run, prompts included."""
        return self.output_tokens / self.seconds

    @property
    def prompt_seconds(self) -> float:
        """Time of the steps that computed prompt tokens."""
        steps = zip(self.step_seconds, self.prompt_step, strict=True)
        return sum(seconds for seconds, is_prompt in steps if is_prompt)

    @property
    def prompt_share(self) -> float:
        """Part of the time that those steps took."""
        return self.prompt_seconds / self.seconds


def median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """Median over runs."""
    return float(statistics.median(map(value, runs)))


def counts(runs: Sequence[Run]) -> dict[str, Any]:
    """Return columns of what is counted, but for the pool's use: exact."""
    return {
        "peak_running": max(max(run.running) for run in runs),
        "mean_running": median(runs, lambda run: statistics.fmean(run.running)),
        "preemptions": median(runs, lambda run: run.preemptions),
        "steps": median(runs, lambda run: len(run.running)),
        "mean_pool_use": median(runs, lambda run: statistics.fmean(run.pool_use)),
    }


def tokens_per_second(runs: Sequence[Run]) -> dict[str, Any]:
    """Return columns of the speed."""
    return spread("tokens_per_s", [run.tokens_per_second for run in runs])


def gains(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, Any]:
    """Return columns of the speed over that of others of the same turn."""
    return {
        **ratios("ratio", runs, others, lambda run: run.tokens_per_second),
        **ratios("cpu_ratio", others, runs, lambda run: run.cpu_seconds),
    }
