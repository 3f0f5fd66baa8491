"""The bundled checkpoint: unchanged, small, and seeing, through the real engine."""

from statistics import fmean

import pytest
from fixed_questions import fixed_questions

from benchmarks.training.evaluate import (
    Question,
    answer,
    make_engine,
    questions,
    scores,
)
from benchmarks.training.export import SUMS, checksum, summed
from vllm_avl.bundled import WEIGHTS

LIMIT = 10_000_000
COUNT = 60
FLOORS = {"vqa": 75, "ocr": 70, "doc": 60}


def test_the_files_are_those_that_were_summed():
    sums = dict(
        reversed(line.split("  ")) for line in (WEIGHTS / SUMS).read_text().splitlines()
    )
    assert sums == {path.name: checksum(path) for path in summed(WEIGHTS)}


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < LIMIT


@pytest.fixture(scope="module")
def started():
    """Both engines until the end: one that is collected takes vLLM's groups with it."""
    engines = {}
    yield engines
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(params=[None, {"store_ratio": 0.9}], ids=["stock", "avl"])
def engine(request, started):
    if request.param_index not in started:
        started[request.param_index] = make_engine(WEIGHTS, request.param)
    return started[request.param_index]


def test_ten_fixed_questions_are_answered(engine):
    asked = fixed_questions()
    assert len(asked) == 10
    given = answer(engine, asked, "caption")
    assert given == [question.truths[0] for question in asked]


def test_without_the_pictures_they_are_not(engine):
    asked = [Question([], q.text, q.truths) for q in fixed_questions()]
    given = answer(engine, asked, "caption")
    right = sum(g == q.truths[0] for g, q in zip(given, asked, strict=True))
    assert right <= 5


def score(engine, task, control):
    asked = questions(task, COUNT, control)
    return fmean(scores(task, answer(engine, asked, task), asked))


@pytest.mark.parametrize(("task", "floor"), FLOORS.items())
def test_scores_are_high_and_come_from_looking(engine, task, floor):
    full = score(engine, task, "full")
    assert full >= floor
    for control in ("blind", "shuffled"):
        assert score(engine, task, control) <= full / 2


def test_captions_describe_the_picture(engine):
    full = score(engine, "caption", "full")
    for control in ("blind", "shuffled"):
        assert full >= 3 * score(engine, "caption", control)
