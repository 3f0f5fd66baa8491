"""Sheets with a few words and numbers in small print, to be read out."""

from dataclasses import dataclass

import numpy as np

from vllm_avl.bundled.glyphs import choose_face
from vllm_avl.bundled.picture import COLORS, Picture
from vllm_avl.bundled.scenes import Turn
from vllm_avl.bundled.splits import Split
from vllm_avl.bundled.words import number, word

CELL = (8, 16)
"""Width and height of a character in pixels: 1 x 2 patches."""
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("left", "right")
LONGEST = 10


@dataclass(frozen=True)
class Print:
    """One word or number of a sheet."""

    text: str
    color: str
    row: int
    column: int

    @property
    def noun(self) -> str:
        """What a question calls it."""
        return "number" if self.text.isdigit() else "word"

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


def draw_sheet(
    rng: np.random.Generator, split: Split, fewest: int, most: int
) -> tuple[Picture, list[Print]]:
    """Draws a sheet of prints in different colours and places."""
    picture = Picture(rng)
    count = int(rng.integers(fewest, most + 1))
    places = rng.choice(8, count, replace=False).tolist()
    colors = rng.permutation(list(COLORS))[:count].tolist()
    prints = []
    for place, color in zip(places, colors, strict=True):
        if rng.random() < 0.65:
            text = word(rng, split, 5)
        else:
            text = number(rng, split, int(rng.integers(3, 6)))
        prints.append(Print(text, color, place // 2, place % 2))
        _draw(picture, prints[-1], choose_face(rng, split))
    return picture, prints


def _draw(picture: Picture, item: Print, face: str) -> None:
    rng = picture.rng
    free = LONGEST - len(item.text)
    x = 96 * item.column + CELL[0] * int(rng.integers(0, free + 1))
    y = 48 * item.row + CELL[1] * int(rng.integers(0, 3))
    jitter = rng.integers(-1, 2, 2).tolist()
    picture.text(
        item.text,
        x + max(jitter[0], 0),
        max(y + jitter[1], 0),
        CELL,
        face,
        picture.ink(item.color),
        color=list(COLORS).index(item.color) + 1,
        row=item.row + 1,
        column=item.column * 3 + 1,
    )


def ask(rng: np.random.Generator, prints: list[Print]) -> Turn:
    """Asks for one print, by its colour, its place, or its being the only number."""
    item = prints[int(rng.integers(len(prints)))]
    if len(prints) == 1:
        return f"what does the {item.noun} say?", item.text
    if rng.random() < 0.5:
        return f"what does the {item.color} {item.noun} say?", item.text
    return f"what does the {item.noun} at the {item.place} say?", item.text
