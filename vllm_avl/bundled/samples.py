"""One sample of a task: pictures and the questions about them, the same for a seed."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vllm_avl.bundled import documents, scenes, sheets
from vllm_avl.bundled.picture import Picture
from vllm_avl.bundled.scenes import Turn
from vllm_avl.bundled.splits import SPLITS, Split

TASKS = ("caption", "vqa", "doc", "ocr", "multi")
DESCRIBE = "describe the picture."
# A quarter is answered by yes or no, half of it each.
VQA_SHARES = {
    "color": 0.1,
    "shape": 0.1,
    "size": 0.04,
    "letter": 0.15,
    "place": 0.1,
    "at": 0.1,
    "count": 0.12,
    "larger": 0.04,
    "exists": 0.09,
    "relation": 0.11,
    "more": 0.05,
}


@dataclass
class Sample:
    """Pictures, turns about them, and other right wordings of the first answer."""

    task: str
    pictures: list[Picture]
    turns: list[Turn]
    references: list[str] = field(default_factory=list)

    def images(self) -> list[Image.Image]:
        """Returns the pictures as images, noise included: call it once."""
        return [picture.image() for picture in self.pictures]


def make_sample(task: str, split: Split, seed: int, num_turns: int = 1) -> Sample:
    """Returns sample number `seed` of a task.

    Args:
        task: One of `TASKS`.
        split: Decides fonts, words, numbers, layouts and pairs of colour and shape.
        seed: The sample's number.
        num_turns: Questions about the same pictures; a caption is the first of them.

    Raises:
        ValueError: `task` is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {TASKS}")
    rng = np.random.default_rng([SPLITS.index(split), TASKS.index(task), seed])
    if task in ("caption", "vqa"):
        return _scene(rng, split, task, num_turns)
    if task == "multi":
        return _multi(rng, split, num_turns)
    if task == "doc":
        picture, document = documents.draw_document(rng, split)
        turns = _different(lambda: documents.ask(rng, document), num_turns)
        return Sample(task, [picture], turns)
    picture, prints = sheets.draw_sheet(rng, split, 1, 5)
    turns = _different(lambda: sheets.ask(rng, prints), num_turns)
    return Sample(task, [picture], turns)


def _scene(rng: np.random.Generator, split: Split, task: str, num_turns: int) -> Sample:
    fewest = 4 if task == "caption" else 3
    picture, things = scenes.draw_scene(rng, split, fewest, 5)
    if task == "vqa":
        return Sample(task, [picture], _different(lambda: _vqa(rng, things), num_turns))
    first = (DESCRIBE, scenes.caption(things))
    more = _different(lambda: _vqa(rng, things), num_turns - 1)
    references = [first[1], scenes.paraphrase(things)]
    return Sample(task, [picture], [first, *more], references)


def _vqa(rng: np.random.Generator, things: list[scenes.Thing]) -> Turn:
    kinds, shares = list(VQA_SHARES), list(VQA_SHARES.values())
    while True:
        turn = scenes.ask(rng, things, str(rng.choice(kinds, p=shares)))
        if turn:
            return turn


def _multi(rng: np.random.Generator, split: Split, num_turns: int) -> Sample:
    """Two pictures and questions about one of them, or about which it is."""
    if rng.random() < 0.35:
        pairs = [sheets.draw_sheet(rng, split, 1, 2) for _ in range(2)]
        prints = [p for _, p in pairs]
        turns = _different(lambda: _in_one(rng, prints, sheets.ask), num_turns)
        return Sample("multi", [p for p, _ in pairs], turns)
    drawn = [scenes.draw_scene(rng, split, 2, 3) for _ in range(2)]
    things = [t for _, t in drawn]

    def ask() -> Turn:
        if rng.random() < 0.3:
            return _which(rng, things)
        return _in_one(rng, things, _vqa)

    turns = _different(ask, num_turns)
    return Sample("multi", [p for p, _ in drawn], turns)


def _in_one(rng: np.random.Generator, contents: list, ask) -> Turn:  # type: ignore[no-untyped-def]
    number = int(rng.integers(len(contents)))
    question, answer = ask(rng, contents[number])
    return f"in image {number + 1}, {question}", answer


def _which(rng: np.random.Generator, contents: list[list[scenes.Thing]]) -> Turn:
    number = int(rng.integers(2))
    names = {t.name for t in contents[1 - number]}
    mine = [t for t in contents[number] if t.name not in names]
    if not mine:
        return _in_one(rng, contents, _vqa)
    thing = mine[int(rng.integers(len(mine)))]
    return f"which image has a {thing.name}?", f"image {number + 1}"


def _different(ask, count: int) -> list[Turn]:  # type: ignore[no-untyped-def]
    """Asks `count` different questions, fewer where there are no more."""
    turns: dict[str, str] = {}
    for _ in range(4 * count):
        if len(turns) == count:
            break
        question, answer = ask()
        turns.setdefault(question, answer)
    return list(turns.items())
