"""Invoices, forms, tickets, signs and tables in small print: ask for one field."""

from dataclasses import dataclass

import numpy as np

from vllm_avl.bundled.glyphs import choose_face
from vllm_avl.bundled.picture import Picture
from vllm_avl.bundled.scenes import Turn
from vllm_avl.bundled.splits import Split
from vllm_avl.bundled.words import number, word

CELL = (8, 16)
"""Width and height of a character in pixels: 1 x 2 patches."""
LINES, LINE_LENGTH = 12, 24

KINDS: dict[str, tuple[str, ...]] = {
    "INVOICE": ("DATE", "CLIENT", "NET", "TAX", "TOTAL", "ORDER", "DUE"),
    "FORM": ("NAME", "CITY", "STREET", "AGE", "PHONE", "CODE", "JOB"),
    "TICKET": ("FROM", "TO", "GATE", "SEAT", "TIME", "TRAIN", "PRICE"),
    "SIGN": ("EXIT", "ROOM", "FLOOR", "HALL", "DESK", "OPEN", "STOP"),
}
ITEMS = ("PEN", "CUP", "HAT", "BAG", "LAMP", "BOOK", "SOAP", "TEA", "RICE", "MILK")
HEADERS = ("QTY", "PRICE", "SIZE", "COST", "BOX", "ROW")
KEYS = sorted({key for keys in KINDS.values() for key in keys} | set(ITEMS))
KEY, VALUE, HEADER = 1, 2, 3
"""Classes of the label `role`."""

# Column of the values, 0 for right behind the key; whole layouts are held out.
LAYOUTS: dict[Split, tuple[int, ...]] = {"train": (0, 8, 11, 13), "test": (9, 12)}
MONEY = ("NET", "TAX", "TOTAL", "PRICE")
DIGITS = {
    "AGE": 2,
    "ORDER": 4,
    "PHONE": 5,
    "CODE": 4,
    "TRAIN": 3,
    "ROOM": 3,
    "FLOOR": 1,
}


@dataclass(frozen=True)
class Document:
    """The fields of a document: a key, or an item and its header, and the value."""

    kind: str
    fields: dict[str | tuple[str, str], str]


def draw_document(rng: np.random.Generator, split: Split) -> tuple[Picture, Document]:
    """Draws one document on light paper."""
    picture = Picture(rng)
    face = choose_face(rng, split)
    ink = rng.integers(0, 70, 3).astype(np.float32)
    if rng.random() < 0.35:
        return picture, _table(picture, split, face, ink)
    return picture, _list(picture, split, face, ink)


def _value(rng: np.random.Generator, split: Split, key: str) -> str:
    if key in MONEY:
        return f"{number(rng, split, int(rng.integers(2, 4)))}.{rng.integers(10, 100)}"
    if key in ("DATE", "DUE"):
        return f"{rng.integers(10, 29)}/{rng.integers(10, 13)}"
    if key in ("TIME", "OPEN"):
        return f"{rng.integers(10, 24)}:{rng.integers(10, 60)}"
    if key in ("SEAT", "GATE"):
        return f"{'ABCDEF'[rng.integers(6)]}{rng.integers(10, 100)}"
    if key in DIGITS:
        return number(rng, split, DIGITS[key])
    return word(rng, split, 6)


def _list(picture: Picture, split: Split, face: str, ink: np.ndarray) -> Document:
    """Writes a title and lines of a key and its value."""
    rng = picture.rng
    kind = str(rng.choice(list(KINDS)))
    keys = rng.permutation(KINDS[kind])[: int(rng.integers(3, 6))].tolist()
    layout = LAYOUTS[split][int(rng.integers(len(LAYOUTS[split])))]
    indent = int(rng.integers(0, 3))
    lines = sorted(rng.choice(np.arange(2, LINES), len(keys), replace=False).tolist())
    jitter = rng.integers(-1, 2, 2).tolist()
    _write(picture, kind, indent + int(rng.integers(0, 6)), 0, face, ink, jitter)
    fields = {}
    for key, line in zip(keys, lines, strict=True):
        fields[key] = _value(rng, split, key)
        label = KEYS.index(key) + 1
        colon = ":" if layout == 0 or rng.random() < 0.5 else ""
        start = indent + (layout or len(key) + 2)
        at = {"face": face, "ink": ink, "jitter": jitter, "key": label}
        _write(picture, key + colon, indent, line, role=KEY, **at)
        _write(picture, fields[key], start, line, role=VALUE, **at)
    return Document(kind.lower(), fields)


def _table(picture: Picture, split: Split, face: str, ink: np.ndarray) -> Document:
    """Writes a row of headers and rows of an item and its numbers."""
    rng = picture.rng
    items = rng.permutation(ITEMS)[: int(rng.integers(3, 5))].tolist()
    headers = rng.permutation(HEADERS)[: int(rng.integers(2, 4))].tolist()
    first = {"train": (5, 6), "test": (7,)}[split]
    start = first[int(rng.integers(len(first)))]
    top, spacing = int(rng.integers(0, 3)), int(rng.integers(1, 3))
    jitter = rng.integers(-1, 2, 2).tolist()
    at = {"face": face, "ink": ink, "jitter": jitter}
    for column, header in enumerate(headers):
        label = HEADERS.index(header) + 1
        place = start + 6 * column
        _write(picture, header, place, top, header=label, role=HEADER, **at)
    fields: dict[str | tuple[str, str], str] = {}
    for row, item in enumerate(items):
        line = top + 1 + spacing * (row + 1) - (spacing - 1)
        label = KEYS.index(item) + 1
        _write(picture, item, 0, line, key=label, role=KEY, **at)
        for column, header in enumerate(headers):
            value = number(rng, split, int(rng.integers(1, 4)))
            fields[item, header] = value
            under = HEADERS.index(header) + 1
            place = start + 6 * column
            _write(
                *(picture, value, place, line, face, ink, jitter),
                key=label,
                header=under,
                role=VALUE,
            )
    return Document("table", fields)


def _write(
    picture: Picture,
    text: str,
    column: int,
    line: int,
    face: str,
    ink: np.ndarray,
    jitter: list[int],
    **classes: int,
) -> None:
    x = column * CELL[0] + max(jitter[0], 0)
    y = min(max(line * CELL[1] + jitter[1], 0), (LINES - 1) * CELL[1])
    picture.text(text[: LINE_LENGTH - column], x, y, CELL, face, ink, **classes)


def ask(rng: np.random.Generator, document: Document) -> Turn:
    """Asks for the value of one field."""
    names = list(document.fields)
    name = names[int(rng.integers(len(names)))]
    answer = document.fields[name]
    if isinstance(name, tuple):
        return f"what is the {name[1].lower()} of {name[0].lower()}?", answer
    return f"what is the {name.lower()} on the {document.kind}?", answer
