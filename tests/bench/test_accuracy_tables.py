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


def tables(document, wanted=frozenset(ALL_TASKS)):
    """Tables with the wanted columns, by default one a task, as dicts by column."""
    found, columns = [], None
    for line in (REPOSITORY / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not line.strip().startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif wanted <= set(columns) and set(cells[0]) != {"-"}:
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def lines(document):
    """Rows by the engine; other tables are of the validation split or of the study."""
    others = {"scoring rows", "500 questions"}
    return [row for row in tables(document) if not others & set(row)]


def key(line, task, store):
    line = {"name": "avl", "S": store, **line}
    if line["name"] in ("full", "blind", "shuffled") or "T" in line:
        line["S"] = "1"
    settings = USUAL | {name: line[name] for name in USUAL if name in line}
    settings["C"] = settings["C"] or settings["S"]
    return task, line["name"], *settings.values()


@pytest.mark.parametrize(("document", "count"), [("docs/accuracy.md", 50)])
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


@pytest.mark.parametrize(
    ("questions", "column", "count"),
    [("100", "policy", 10), ("500", "500 questions", 15)],
)
def test_rankings_are_the_csvs(questions, column, count, measured):
    with (RESULTS / "ranking.csv").open(newline="") as rows:
        ranked = {
            (row["task"], row["name"], row["S"]): row
            for row in csv.DictReader(rows)
            if (row["first"], row["questions"]) == ("0", questions)
        }
    found = tables("docs/accuracy.md", {column, "doc", "ocr"})
    assert len(found) == count
    for line in found:
        name, ratio = line[column], line["S"]
        for task in set(ALL_TASKS) & {task for task, cell in line.items() if cell}:
            score, *told = line[task].rstrip("]").split(" [")
            row = ranked.get((task, name, ratio))
            by_engine = name == "avl" and questions == "100"
            if by_engine:
                row = measured[key({"name": name, "S": ratio}, task, None)]
            assert float(score) == pytest.approx(float(row["score"]), abs=0.051), line
            assert bool(told) == (name != "full" and not by_engine)
            for bound, end in zip(
                told and told[0].split(", "), ("diff_low", "diff_high"), strict=False
            ):
                assert float(bound) == pytest.approx(float(row[end]), abs=0.051)
