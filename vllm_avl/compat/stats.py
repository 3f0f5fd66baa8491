"""Carries what the scheduler counts to the front end's /metrics and log.

`SchedulerStats` has no field for a plug-in. The message travels in the one for KV
connectors, beside what a connector reports, and is taken out before anybody else looks.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vllm_avl.compat.borrowed import put_into, take_from
from vllm_avl.compat.platform import is_chosen
from vllm_avl.metrics import collectors
from vllm_avl.metrics.collectors import Message
from vllm_avl.metrics.pool import POOL
from vllm_avl.metrics.summary import Summary

SECONDS_BETWEEN_LINES = 60.0

logger = logging.getLogger("vllm.avl")


def send(stats: SchedulerStats, message: Message) -> None:
    """Put a message into an engine's statistics."""
    stats.kv_connector_stats = put_into(stats.kv_connector_stats, vars(message))


def receive(stats: SchedulerStats) -> Message | None:
    """Take the message out of an engine's statistics."""
    ours, stats.kv_connector_stats = take_from(stats.kv_connector_stats)
    return None if ours is None else Message(**ours)


class AVLStatLogger(AggregateStatLoggerBase):
    """Records the messages of all engines that this front end hears from."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._model = vllm_config.model_config.served_model_name
        self._summary = Summary()
        self._last_line = time.monotonic()
        collectors.start(self._model, engine_indexes)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add what one engine's step reports."""
        message = None if scheduler_stats is None else receive(scheduler_stats)
        if message is not None:
            collectors.record(message, self._model, engine_idx)
            self._summary.add(message, engine_idx)
            POOL.sample(message, engine_idx)

    def log(self) -> None:
        """Write one line a minute, where anything was adapted or left alone."""
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        line = self._summary.take_line()
        if line:
            logger.info(line)

    def log_engine_initialized(self) -> None:
        """The scheduler has said what is on."""


def add_logger(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `StatLoggerManager.__init__`: ours comes first."""

    @functools.wraps(original)
    def init(
        self: Any,
        vllm_config: VllmConfig,
        engine_idxs: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(self, vllm_config, engine_idxs, *args, **kwargs)
        if is_chosen(vllm_config):
            ours = AVLStatLogger(vllm_config, self.engine_indexes)
            self.stat_loggers.insert(0, ours)

    return init


def attach_counts(output: Any, counts: Mapping[str, float]) -> None:
    """Let a worker's counts travel with the output of its step, which has ended."""
    output.avl_counts = {name: float(number) for name, number in counts.items()}


def attached_counts(output: Any) -> Mapping[str, float]:
    """Counts that came with a worker's output."""
    return getattr(output, "avl_counts", {})
