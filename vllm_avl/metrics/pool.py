"""The recent past of the engines' block pools, as this front end heard of it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from vllm_avl.messages import Statistics
from vllm_avl.metrics.definitions import key
from vllm_avl.reports import ANSWER

NUM_SAMPLES = 600
SECONDS_BETWEEN_SAMPLES = 1.0


@dataclass(frozen=True)
class Sample:
    """One engine's blocks at one moment."""

    __pydantic_config__ = ANSWER

    time: float
    """Seconds since 1970."""
    engine: int
    held: int
    """Blocks that requests hold."""
    stock: int
    """Blocks that they would hold without eviction."""


@dataclass
class Pool:
    """At most a sample a second and engine; the oldest go."""

    _samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    _sampled: dict[int, float] = field(default_factory=dict)
    """When each engine was last sampled."""
    _latest: dict[int, Sample] = field(default_factory=dict)

    def sample(self, message: Statistics, engine: int) -> None:
        """Take an engine's message."""
        now = time.time()
        held, stock = (
            int(message.levels[key(name)])
            for name in ("kv_blocks_held", "kv_blocks_stock")
        )
        self._latest[engine] = Sample(now, engine, held, stock)
        if now - self._sampled.get(engine, 0.0) >= SECONDS_BETWEEN_SAMPLES:
            self._sampled[engine] = now
            self._samples.append(self._latest[engine])

    def timeline(self) -> list[Sample]:
        """Return the samples, oldest first, and what holds now behind them."""
        latest = [s for s in self._latest.values() if s not in self._samples]
        return [*self._samples, *latest]


POOL = Pool()
"""Of this process: a front end has one."""
