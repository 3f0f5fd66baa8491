"""Every benchmark runs from end to end in its short form and prints its table."""

import sys
from pathlib import Path

import preloaded
import pytest
from printed_tables import printed_tables

SCRIPTS = [
    *("concurrency.py", "overhead.py", "memory.py", "decode.py", "operation.py"),
    *("turns.py", "host_time.py", "drafts.py", "ranking_study.py", "startup.py"),
]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


SMALL = ("--hidden-size", "64", "--num-heads", "2", "--num-kv-heads", "2")


@pytest.mark.parametrize(
    ("script", "column", "options"),
    [
        ("concurrency.py", "peak_running", (*SMALL, "--images", "1")),
        ("overhead.py", "ratio", SMALL),
        ("memory.py", "transient_fits", SMALL),
        ("decode.py", "refresh_ratio", SMALL),
        ("operation.py", "adapted", (*SMALL, "--num-layers", "2")),
        ("drafts.py", "accepted", ()),
    ],
)
def test_quick(script, column, options, tmp_path):
    folders = ["--results", tmp_path, "--checkpoints", tmp_path / "models"]
    command = [sys.executable, BENCHMARKS / script, "--quick", *options, *folders]
    result = preloaded.run(command, 400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"| {column} " in result.stdout or f" {column} |" in result.stdout


def test_starts_of_stock_and_avl_are_timed(tmp_path):
    folders = ["--results", tmp_path, "--logs", tmp_path / "logs"]
    command = [sys.executable, BENCHMARKS / "startup.py", "--quick", *folders]
    result = preloaded.run(command, 400)
    assert result.returncode == 0, result.stderr[-3000:]
    (rows,) = printed_tables(result.stdout)
    assert [row["variant"] for row in rows] == ["stock", "avl"]
    for row in rows:
        assert 1 < float(row["ready_s"]) < float(row["answered_s"])
    started = (tmp_path / "logs" / "avl.log").read_text()
    assert "adaptive attention is on" in started
    stock = (tmp_path / "logs" / "stock.log").read_text()
    assert "adaptive attention" not in stock


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    command = [sys.executable, str(BENCHMARKS / script), "--help"]
    result = preloaded.run(command, 100)
    assert result.returncode == 0
    assert "--quick" in result.stdout
