"""The accuracy table: it is measured, taken up again, and its controls control."""

import csv
import sys
from pathlib import Path

import numpy as np
import preloaded
import pytest

from benchmarks.accuracy import interval

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


def run(*options):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return preloaded.run(command, 500)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder that the short form wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("accuracy")
    result = run("--quick", "--tasks", "vqa", "ocr", "--results", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def rows(folder):
    with (folder / "accuracy.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_table_has_every_kind_of_cell(measured):
    folder, printed = measured
    assert "| name " in printed
    assert (folder / "accuracy.png").stat().st_size > 10_000
    found = {(row["task"], row["part"], row["name"]) for row in rows(folder)}
    for task in ("vqa", "ocr"):
        for cell in (
            *(("control", "full"), ("control", "blind"), ("control", "shuffled")),
            *(("store", "avl"), ("store", "random"), ("core", "avl"), ("text", "avl")),
            ("store", "downsample"),
        ):
            assert (task, *cell) in found


def test_scores_come_from_the_pictures_and_blocks_are_freed(measured):
    folder, _ = measured
    of_cell = {(row["task"], row["part"], row["name"]): row for row in rows(folder)}
    for task in ("vqa", "ocr"):
        full, blind, kept = (
            of_cell[task, *cell]
            for cell in (("control", "full"), ("control", "blind"), ("store", "avl"))
        )
        assert float(blind["score"]) < float(full["score"])
        assert float(full["low"]) <= float(full["score"]) <= float(full["high"])
        # Of 576 vision tokens 0.7 are stored; the text is, too.
        assert 0.65 < float(kept["kv_bytes"]) / float(full["kv_bytes"]) < 0.9
        smaller = of_cell[task, "store", "downsample"]
        # As few tokens, where the others are whole blocks.
        assert 0.65 < float(smaller["kv_bytes"]) / float(full["kv_bytes"]) < 0.8


def test_differences_to_full_are_paired(measured):
    folder, printed = measured
    of_cell = {(row["task"], row["part"], row["name"]): row for row in rows(folder)}
    for task in ("vqa", "ocr"):
        full, blind = (of_cell[task, "control", name] for name in ("full", "blind"))
        assert (float(full["diff_low"]), float(full["diff_high"])) == (0, 0)
        less = float(blind["score"]) - float(full["score"])
        assert float(blind["diff_low"]) <= less <= float(blind["diff_high"]) < 0
    assert "Less than full, with a paired interval" in printed


def test_some_policies_alone(tmp_path):
    options = ("--quick", "--tasks", "vqa", "--policies", "downsample")
    result = run(*options, "--results", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    names = {row["name"] for row in rows(tmp_path)}
    assert names == {"full", "blind", "shuffled", "downsample"}


def test_what_is_measured_is_not_measured_again(measured):
    folder, _ = measured
    before = (folder / "accuracy.csv").read_bytes()
    result = run("--quick", "--tasks", "vqa", "ocr", "--results", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "accuracy.csv").read_bytes() == before


def test_a_table_of_nothing_is_refused(tmp_path):
    result = run("--only-table", "--results", tmp_path)
    assert result.returncode == 1
    assert "measure without --only-table" in result.stderr


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = [100.0 * (rng.random(200) < 0.7) for _ in range(100)]
    held = sum(low <= 70 <= high for low, high in map(interval, draws))
    assert 88 <= held <= 100
    assert interval([3.0, 3.0]) == (3.0, 3.0)
