"""The bundled tasks as lmms-eval wants them; needs `vllm_avl.bundled` on the path.

A row of a dataset says task and number of a question; all else is drawn from that.
"""

from functools import cache
from statistics import fmean

from benchmarks.training.evaluate import Question, questions, scores


@cache
def _question(task: str, number: int) -> Question:
    (found,) = questions(task, 1, first=number)
    return found


def messages(doc: dict) -> list[dict]:
    """Return the turns of the chat; the pictures stand in the first."""
    asked = _question(**doc)
    return asked.chat([{"type": "image", "url": picture} for picture in asked.images])


def target(doc: dict) -> str:
    """Return the right answer."""
    return _question(**doc).truths[0]


def results(doc: dict, answers: list[str]) -> dict[str, object]:
    """Return the score of one answer, or for CIDEr what it is made of."""
    answer, asked = answers[0].strip(), _question(**doc)
    if doc["task"] == "caption":
        return {"cider": (answer, asked)}
    name = "anls" if doc["task"] == "doc" else "exact"
    return {name: scores(doc["task"], [answer], [asked])[0]}


def cider(items: list[tuple[str, Question]]) -> float:
    """Return the mean CIDEr of all captions."""
    answers, asked = zip(*items, strict=True)
    return fmean(scores("caption", answers, asked))


def no_visual(doc: dict) -> list:
    """Return nothing: the messages have the pictures."""
    return []
