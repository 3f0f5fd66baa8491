"""What is counted: names, sums, and the lines of the log."""

from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_avl.config import AVLConfig
from vllm_avl.messages import Statistics
from vllm_avl.metrics import collectors, pool
from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import (
    COUNTERS,
    GAUGES,
    PREFIX,
    Stage,
    Stock,
    key,
)
from vllm_avl.metrics.summary import Summary, describe_blocks, describe_settings


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own, in place of the process's."""
    fresh = CollectorRegistry()
    make = collectors._make
    monkeypatch.setattr(
        collectors,
        "_make",
        lambda kind, metric, **options: make(kind, metric, registry=fresh, **options),
    )
    collectors._collectors.cache_clear()
    yield fresh
    collectors._collectors.cache_clear()


def message(counts=(), held=0, stock=0):
    levels = {"kv_blocks_held": held, "kv_blocks_stock": stock}
    return Statistics(dict(counts), levels)


def test_a_counter_is_there_before_anything_happens(registry):
    collectors.start("model", [0, 1])
    found = collectors.totals(registry)
    for metric in COUNTERS:
        for value in metric.label or (None,):
            label = f"{{{metric.label_name}={value}}}" if value else ""
            assert found[f"{PREFIX}{metric.name}_total{label}"] == 0


def test_every_metric_has_a_sentence_of_help(registry):
    collectors.start("model", [0])
    for family in registry.collect():
        assert family.documentation.endswith(".")


def test_no_two_metrics_share_a_name():
    names = [metric.name for metric in COUNTERS + GAUGES]
    assert len(names) == len(set(names))


def test_engines_are_told_apart_and_added_up(registry):
    for engine, number in ((0, 2), (1, 3), (1, 4)):
        counted = {"refreshes": number, key("requests_left_alone", Stock.OFF): 1}
        collectors.record(message(counted, held=number), "model", engine)
    sample = registry.get_sample_value
    labels = {"model_name": "model", "engine": "1"}
    assert sample("vllm_avl_refreshes_total", labels) == 7
    assert sample("vllm_avl_kv_blocks_held", labels) == 4
    left = "vllm_avl_requests_left_alone_total"
    assert sample(left, labels | {"reason": "off"}) == 2
    totals = collectors.totals(registry)
    assert totals["vllm_avl_refreshes_total"] == 9
    assert totals["vllm_avl_kv_blocks_held"] == 6
    assert totals[f"{left}{{reason=off}}"] == 3


def test_an_unknown_metric_is_an_error(registry):
    with pytest.raises(KeyError):
        collectors.record(message({"never_heard_of": 1}), "model", 0)


def test_the_help_of_reasons_names_them_all():
    (metric,) = [metric for metric in COUNTERS if metric.label is Stock]
    for reason in Stock:
        assert reason in metric.help
    (metric,) = [metric for metric in COUNTERS if metric.label is Stage]
    for stage in Stage:
        assert stage in metric.help


def test_counts_start_anew_once_taken():
    counts = Counts()
    counts.count("a")
    counts.add({"a": 2, "b": 0.5})
    assert counts.take() == {"a": 3, "b": 0.5}
    assert counts.take() == {}


def test_a_line_says_what_happened_since_the_last():
    summary = Summary()
    assert summary.take_line() is None
    counted = {
        "requests_adapted": 3,
        key("requests_left_alone", Stock.NO_VISION): 2,
        "blocks_freed_early": 40,
    }
    summary.add(message(counted, held=10, stock=30), 0)
    summary.add(message(held=5, stock=5), 1)
    line = summary.take_line()
    assert "adapted 3 requests, left 2 alone (no_vision 2)" in line
    assert "freed 40 blocks early" in line
    assert "15 blocks held now, 35 without eviction" in line
    assert summary.take_line() is None


def test_the_line_at_start_up_says_what_is_on():
    line = describe_settings(AVLConfig(core_ratio=0.3, text_keep_ratio=0.4))
    for part in ("policy avl", "stores 0.5", "reads 0.3", "every 3 steps", "0.4 of te"):
        assert part in line
    assert "reads" not in describe_settings(AVLConfig())


def test_the_pools_past_is_bounded_and_ends_with_the_present(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pool.time, "time", lambda: now[0])
    past = pool.Pool()
    for tick in range(4 * pool.NUM_SAMPLES):
        now[0] = 100 + tick / 2
        past.sample(message(held=tick, stock=2 * tick), 0)
    timeline = past.timeline()
    assert len(timeline) <= pool.NUM_SAMPLES + 1
    assert timeline[-1].held == 4 * pool.NUM_SAMPLES - 1
    times = [sample.time for sample in timeline]
    assert times == sorted(times)
    assert min(b - a for a, b in pairwise(times[:-1])) >= 1


def test_collectors_are_what_prometheus_makes(registry):
    kinds = {Counter: COUNTERS, Gauge: GAUGES}
    for kind, metrics in kinds.items():
        for metric in metrics:
            assert isinstance(collectors._collectors()[metric.name], kind)


def test_large_blocks_free_little():
    line = describe_blocks(AVLConfig(), 32)
    assert "blocks of 32 tokens" in line
    assert "1000 tokens gives 15 of 34 blocks back, with four 62 of 127" in line
    assert "gives 0 of 3 blocks back" in describe_blocks(AVLConfig(), 528)
