"""Host time: the short form measures all parts, and leaves out what is not decoding."""

import sys
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
from printed_tables import printed_tables

from benchmarks import host_time

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host_time.py"
VARIANTS = ["stock", "S=0.5", "S=0.5 C=0.3 K=3"]


def test_quick(tmp_path):
    folders = ["--results", str(tmp_path), "--checkpoints", str(tmp_path / "models")]
    result = preloaded.run([sys.executable, SCRIPT, "--quick", *folders], 400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.index("checked: `avl: 0` gives stock's tokens") < (
        result.stdout.index("Host time per request")
    )
    (rows,) = printed_tables(result.stdout)
    assert [row["variant"] for row in rows] == VARIANTS
    for row in rows:
        assert int(row["steps"]) > 5
        builder, before, model, after, step = (
            float(row[f"{part}_us"])
            for part in ("builder", "before", "pass", "after", "step")
        )
        assert 0 < builder < before < step
        assert 0 < after < step
        assert 0 < model < step
    assert {float(rows[0][name]) for name in rows[0] if "_over" in name} == {0}
    assert (tmp_path / "host_time-quick.png").stat().st_size > 5_000
    assert not list(tmp_path.glob("*.csv"))


class Clock:
    """Stands in for `time`: it advances where a fake says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def spend(self, seconds, *calls):
        def run():
            for call in calls:
                getattr(*call)()
            self.now += seconds

        return run


def fake_worker(clock):
    """Return a worker whose parts take 1, 2, 4 and 8 seconds."""
    builder, runner, worker = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()
    builder.build = clock.spend(1)
    runner._model_forward = clock.spend(2)
    runner.attn_groups = [[SimpleNamespace(get_metadata_builder=lambda: builder)]]
    worker.model_runner = runner
    worker.execute_model = clock.spend(
        4, (builder, "build"), (runner, "_model_forward")
    )
    worker.sample_tokens = clock.spend(8)
    return worker


def test_every_part_gets_its_own_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(host_time, "time", clock)
    worker = fake_worker(clock)
    unwatched = worker.execute_model
    with host_time.watched(worker) as watch:
        for _ in range(2):
            worker.execute_model()
            worker.sample_tokens()
    assert watch.seconds == {
        "builder": [1, 1],
        "before": [1, 1],
        "pass": [2, 2],
        "after": [12, 12],
    }
    assert worker.execute_model is unwatched


def test_only_steps_in_which_all_decode_count():
    run = SimpleNamespace(
        prompt_step=[True, True, False, False],
        running=[1, 2, 2, 1],
        step_seconds=[1, 2, 3, 4],
    )
    parts = {name: [10, 20, 30, 40] for name in host_time.WORKER_PARTS}
    watch = host_time.Watch(parts)
    assert host_time.decode_steps(watch, run, 2).seconds["step"] == [3]
    assert host_time.decode_steps(watch, run, 2).seconds["builder"] == [30]
    with pytest.raises(SystemExit, match="no step decodes 3 requests"):
        host_time.decode_steps(watch, run, 3)
