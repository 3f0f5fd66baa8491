"""Every benchmark runs from end to end in its short form and prints its table."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [
    *("concurrency.py", "overhead.py", "memory.py", "decode.py", "operation.py"),
    *("turns.py", "host_time.py", "drafts.py"),
]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "column"),
    [
        ("concurrency.py", "peak_running"),
        ("overhead.py", "ratio"),
        ("memory.py", "transient_fits"),
        ("decode.py", "refresh_ratio"),
        ("operation.py", "adapted"),
        ("drafts.py", "accepted"),
    ],
)
def test_quick(script, column, tmp_path):
    folders = ["--results", str(tmp_path), "--checkpoints", str(tmp_path / "models")]
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", *folders],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"| {column} " in result.stdout or f" {column} |" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    command = [sys.executable, str(BENCHMARKS / script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0
    assert "--quick" in result.stdout
