"""The tables of the documents say what the CSV does."""

import csv
import hashlib
from pathlib import Path

import pytest

from benchmarks.training.evaluate import ALL_TASKS
from vllm_avl.bundled import WEIGHTS

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
USUAL = {"S": "1", "C": None, "K": "-", "T": "1"}


@pytest.fixture(scope="module")
def measured():
    """Rows of the CSV by task and settings, those of the shipped weights."""
    with (RESULTS / "accuracy.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    digest = hashlib.sha256((WEIGHTS / "model.safetensors").read_bytes()).hexdigest()
    return {
        (row["task"], row["name"], row["S"], row["C"], row["K"], row["T"]): row
        for row in rows
        if digest.startswith(row["model"])
    }


def tables(document):
    """Tables with a column a task, as dicts by column."""
    found, columns = [], None
    for line in (REPOSITORY / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif set(ALL_TASKS) <= set(columns) and set(cells[0]) != {"-"}:
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def lines(document):
    """Rows of the test split; those of the validation split are by scoring rows."""
    return [row for row in tables(document) if "scoring rows" not in row]


def key(line, task, store):
    line = {"name": "avl", "S": store, **line}
    if line["name"] in ("full", "blind", "shuffled") or "T" in line:
        line["S"] = "1"
    settings = USUAL | {name: line[name] for name in USUAL if name in line}
    settings["C"] = settings["C"] or settings["S"]
    return task, line["name"], *settings.values()


@pytest.mark.parametrize(("document", "count"), [("docs/accuracy.md", 43)])
def test_tables_are_the_csv(document, count, measured):
    found = lines(document)
    assert len(found) == count
    for line in found:
        for task in ALL_TASKS:
            row = measured[key(line, task, store="0.5")]
            score, *spread = line[task].split(" ±")
            assert float(score) == pytest.approx(float(row["score"]), abs=0.051), line
            if spread:
                half = (float(row["high"]) - float(row["low"])) / 2
                assert float(spread[0]) == pytest.approx(half, abs=0.051), line
