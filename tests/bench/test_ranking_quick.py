"""The study of rankings runs without a server, and its rows tell policies apart."""

import csv
import sys
from pathlib import Path

import preloaded

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ranking_study.py"
OPTIONS = (
    *("--tasks", "ocr", "--policies", "avl", "streaming", "mixkv", "downsample"),
    *("--budgets", "0.5", "0.5", "1", "2", "--count", "4", "--ratios", "0.2"),
)


def test_quick(tmp_path):
    command = [sys.executable, SCRIPT, *OPTIONS, "--results", tmp_path]
    result = preloaded.run([*map(str, command)], 500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| heads " in result.stdout
    with (tmp_path / "ranking.csv").open(newline="") as lines:
        rows = {(row["name"], row["layers"]): row for row in csv.DictReader(lines)}
    budgets = "0.5 0.5 1 2"
    assert rows.keys() == {
        *(("full", "-"), ("avl", "-"), ("streaming", "-"), ("mixkv", "-")),
        *(("avl", budgets), ("streaming", budgets), ("mixkv", budgets)),
        ("downsample", "-"),
    }
    # The first held-out questions are answered right, and by whoever keeps the words.
    assert float(rows["full", "-"]["score"]) == 100
    assert float(rows["avl", "-"]["score"]) == 100
    assert float(rows["streaming", "-"]["score"]) < 100
    assert float(rows["avl", "-"]["diff_low"]) == 0
