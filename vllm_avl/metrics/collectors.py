"""The Prometheus collectors behind the metrics, in a front end."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_avl.messages import Statistics
from vllm_avl.metrics.definitions import COUNTERS, GAUGES, PREFIX, Metric, key

LABELS = ("model_name", "engine")


@cache
def _collectors() -> dict[str, Counter | Gauge]:
    """Registered once a process, as Prometheus demands."""
    counters = {metric.name: _make(Counter, metric) for metric in COUNTERS}
    gauges = {
        # As vLLM's own: several API servers report on the same engines.
        metric.name: _make(Gauge, metric, multiprocess_mode="mostrecent")
        for metric in GAUGES
    }
    return counters | gauges


def _make(
    kind: type[Counter] | type[Gauge], metric: Metric, **options: str
) -> Counter | Gauge:
    labels = (*LABELS, metric.label_name) if metric.label_name else LABELS
    return kind(PREFIX + metric.name, metric.help, labels, **options)  # type: ignore[arg-type]


def start(model: str, engines: Iterable[int]) -> None:
    """Show every counter as 0 from the first scrape on."""
    for engine in engines:
        for metric in COUNTERS:
            for value in metric.label or (None,):
                _member(key(metric.name, value), model, engine)


def record(message: Statistics, model: str, engine: int) -> None:
    """Add what an engine reports to the process's collectors."""
    for name, added in message.counts.items():
        _member(name, model, engine).inc(added)
    for name, level in message.levels.items():
        gauge = _member(name, model, engine)
        assert isinstance(gauge, Gauge)
        gauge.set(level)


def _member(name: str, model: str, engine: int) -> Counter | Gauge:
    family, _, value = name.partition("/")
    labels = (model, str(engine), *([value] if value else ()))
    return _collectors()[family].labels(*labels)


def totals(registry: CollectorRegistry) -> dict[str, float]:
    """Return all metrics as /metrics shows them, summed over models and engines."""
    found: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if not sample.name.startswith(PREFIX) or sample.name.endswith("_created"):
                continue
            rest = [f"{k}={v}" for k, v in sample.labels.items() if k not in LABELS]
            name = sample.name + (f"{{{','.join(rest)}}}" if rest else "")
            found[name] = found.get(name, 0.0) + sample.value
    return found
