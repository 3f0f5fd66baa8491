"""Scenes of coloured shapes, some with a letter on them: captions and questions."""

from dataclasses import dataclass

import numpy as np

from vllm_avl.bundled.glyphs import CHARACTERS, choose_face
from vllm_avl.bundled.picture import COLORS, SHAPES, SIZES, Picture, shape_mask
from vllm_avl.bundled.splits import Split, split_of

Turn = tuple[str, str]
"""A question and its answer."""

PIXELS = {"small": 24, "large": 40}
LETTER = (8, 16)
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("left", "middle left", "middle right", "right")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    color: str
    shape: str
    size: str
    row: int
    column: int
    letter: str

    @property
    def name(self) -> str:
        """Its colour and shape, unique in its scene."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


def draw_scene(
    rng: np.random.Generator, split: Split, fewest: int, most: int
) -> tuple[Picture, list[Thing]]:
    """Draws a scene; a held-out one has a pair of colour and shape never trained on."""
    things = _things(rng, split, int(rng.integers(fewest, most + 1)))
    picture = Picture(rng)
    face = choose_face(rng, split)
    for thing in things:
        _draw(picture, thing, things, face)
    return picture, things


def _things(rng: np.random.Generator, split: Split, count: int) -> list[Thing]:
    names = [(c, s) for c in COLORS for s in SHAPES]
    held_out = [n for n in names if split_of(" ".join(n)) == "test"]
    trained = [n for n in names if n not in held_out]
    pool = trained if split == "train" else names
    chosen = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
    if split == "test":
        chosen = _first_of(rng, chosen, held_out)
    if count > 2 and rng.random() < 0.6:
        chosen = _repeat(rng, chosen, pool)
    cells = sorted(rng.choice(16, count, replace=False).tolist())
    things = []
    for (color, shape), cell in zip(chosen, cells, strict=True):
        size = SIZES[rng.integers(2)]
        has_letter = size == "large" and rng.random() < 0.8
        letter = CHARACTERS[rng.integers(26)] if has_letter else ""
        things.append(Thing(color, shape, size, cell // 4, cell % 4, letter))
    return things


def _first_of(
    rng: np.random.Generator,
    chosen: list[tuple[str, str]],
    held_out: list[tuple[str, str]],
) -> list[tuple[str, str]]:
    """Puts a held-out pair first, where `_repeat` leaves it alone."""
    mine = [n for n in chosen if n in held_out]
    first = mine[0] if mine else held_out[int(rng.integers(len(held_out)))]
    return [first, *[n for n in chosen if n != first][: len(chosen) - 1]]


def _repeat(
    rng: np.random.Generator, chosen: list[tuple[str, str]], pool: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Gives the last objects the first one's colour or shape, so counts vary."""
    part = int(rng.integers(2))
    alike = [n for n in pool if n[part] == chosen[0][part] and n not in chosen]
    for place in range(int(rng.integers(1, len(chosen))), len(chosen)):
        if alike:
            chosen[place] = alike.pop(int(rng.integers(len(alike))))
    return chosen


def _draw(picture: Picture, thing: Thing, things: list[Thing], face: str) -> None:
    size = PIXELS[thing.size]
    jitter = picture.rng.integers((0, -4), 5)
    x = 48 * thing.column + 20 - size // 2 + int(jitter[0])
    y = 48 * thing.row + 24 - size // 2 + int(jitter[1])
    picture.stamp(shape_mask(thing.shape, size), x, y, picture.ink(thing.color))
    place = {"row": thing.row + 1, "column": thing.column + 1}
    picture.mark(
        *(x, y, size, size),
        color=list(COLORS).index(thing.color) + 1,
        shape=SHAPES.index(thing.shape) + 1,
        size=SIZES.index(thing.size) + 1,
        same_color=min(6, sum(t.color == thing.color for t in things)),
        same_shape=min(6, sum(t.shape == thing.shape for t in things)),
        **place,
    )
    if thing.letter:
        light = thing.color in ("yellow", "cyan", "orange")
        ink = np.full(3, 15.0 if light else 245.0, np.float32)
        left, top = 48 * thing.column + 16, 48 * thing.row + 16
        picture.text(thing.letter, left, top, LETTER, face, ink)


def caption(things: list[Thing]) -> str:
    """Describes every object, row by row."""
    parts = []
    for thing in things:
        letter = f" with letter {thing.letter}" if thing.letter else ""
        parts.append(f"a {thing.size} {thing.name}{letter} at the {thing.place}")
    listed = ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + parts[-1]
    noun = "object" if len(things) == 1 else "objects"
    return f"there are {NUMBERS[len(things)]} {noun} in the picture: {listed}."


def paraphrase(things: list[Thing]) -> str:
    """Says the same in other words: the second reference of a caption."""
    parts = []
    for thing in things:
        letter = f" with the letter {thing.letter}" if thing.letter else ""
        parts.append(f"a {thing.size} {thing.name}{letter} is at the {thing.place}")
    return f"the picture shows {NUMBERS[len(things)]} objects. {', '.join(parts)}."


def ask(rng: np.random.Generator, things: list[Thing], kind: str) -> Turn | None:
    """Asks one question of a kind of `QUESTIONS`, None where the scene has none."""
    return QUESTIONS[kind](rng, things)


def _pick(rng: np.random.Generator, things: list[Thing]) -> Thing:
    return things[int(rng.integers(len(things)))]


def _alone(things: list[Thing], part: str) -> list[Thing]:
    values = [getattr(t, part) for t in things]
    return [t for t in things if values.count(getattr(t, part)) == 1]


def _color(rng: np.random.Generator, things: list[Thing]) -> Turn | None:
    alone = _alone(things, "shape")
    if not alone:
        return None
    thing = _pick(rng, alone)
    return f"what color is the {thing.shape}?", thing.color


def _shape(rng: np.random.Generator, things: list[Thing]) -> Turn | None:
    alone = _alone(things, "color")
    if not alone:
        return None
    thing = _pick(rng, alone)
    return f"what shape is the {thing.color} object?", thing.shape


def _size(rng: np.random.Generator, things: list[Thing]) -> Turn:
    thing = _pick(rng, things)
    return f"what size is the {thing.name}?", thing.size


def _letter(rng: np.random.Generator, things: list[Thing]) -> Turn | None:
    lettered = [t for t in things if t.letter]
    if not lettered:
        return None
    thing = _pick(rng, lettered)
    return f"what letter is on the {thing.name}?", thing.letter


def _place(rng: np.random.Generator, things: list[Thing]) -> Turn:
    thing = _pick(rng, things)
    return f"where is the {thing.name}?", thing.place


def _at(rng: np.random.Generator, things: list[Thing]) -> Turn:
    thing = _pick(rng, things)
    return f"what is at the {thing.place}?", thing.name


def _count(rng: np.random.Generator, things: list[Thing]) -> Turn:
    if rng.random() < 0.5:
        color = str(rng.choice(list(COLORS)))
        if rng.random() < 0.8:
            color = _pick(rng, things).color
        number = sum(t.color == color for t in things)
        return f"how many {color} objects are there?", str(number)
    shape = _pick(rng, things).shape if rng.random() < 0.8 else str(rng.choice(SHAPES))
    number = sum(t.shape == shape for t in things)
    return f"how many of shape {shape} are there?", str(number)


def _exists(rng: np.random.Generator, things: list[Thing]) -> Turn:
    """Asks for a pair; a wrong one is put together from what the scene has."""
    names = {t.name for t in things}
    crossed = [f"{a.color} {b.shape}" for a in things for b in things]
    every = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    wrong = sorted(set(crossed) - names) or sorted(set(every) - names)
    if rng.random() < 0.5:
        return f"is there a {_pick(rng, things).name}?", "yes"
    return f"is there a {wrong[int(rng.integers(len(wrong)))]}?", "no"


def _relation(rng: np.random.Generator, things: list[Thing]) -> Turn | None:
    first, second = rng.permutation(len(things))[:2]
    one, other = things[first], things[second]
    axis = "column" if rng.random() < 0.5 else "row"
    gap = getattr(one, axis) - getattr(other, axis)
    if not gap:
        return None
    words = ("left of", "right of") if axis == "column" else ("above", "below")
    true = words[gap > 0]
    said = words[int(rng.integers(2))]
    return f"is the {one.name} {said} the {other.name}?", YES_NO[said != true]


def _more(rng: np.random.Generator, things: list[Thing]) -> Turn | None:
    shapes = sorted({t.shape for t in things})
    if len(shapes) < 2:
        return None
    one, other = (shapes[i] for i in rng.permutation(len(shapes))[:2])
    counts = [sum(t.shape == s for t in things) for s in (one, other)]
    if counts[0] == counts[1]:
        return None
    return (
        f"is shape {one} more often than {other}?",
        YES_NO[counts[0] < counts[1]],
    )


def _larger(rng: np.random.Generator, things: list[Thing]) -> Turn | None:
    small = [t for t in things if t.size == "small"]
    large = [t for t in things if t.size == "large"]
    if not small or not large:
        return None
    pair = [_pick(rng, small), _pick(rng, large)]
    first, second = (pair[i].name for i in rng.permutation(2))
    return f"which is larger, the {first} or the {second}?", pair[1].name


QUESTIONS = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "letter": _letter,
    "place": _place,
    "at": _at,
    "count": _count,
    "exists": _exists,
    "relation": _relation,
    "more": _more,
    "larger": _larger,
}
