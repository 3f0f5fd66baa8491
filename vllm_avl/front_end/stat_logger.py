"""Brings what the schedulers count to this front end's /metrics and log."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vllm_avl.compat.platform import is_chosen
from vllm_avl.messages import take_statistics
from vllm_avl.metrics import collectors
from vllm_avl.metrics.pool import POOL
from vllm_avl.metrics.summary import Summary

SECONDS_BETWEEN_LINES = 60.0

logger = logging.getLogger("vllm.avl")


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
        message = None if scheduler_stats is None else take_statistics(scheduler_stats)
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
