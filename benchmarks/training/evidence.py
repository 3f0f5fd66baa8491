"""Which patches a question is about, read from its words: the labels they have."""

import re

from vllm_avl.bundled.documents import HEADERS, KEYS, VALUE
from vllm_avl.bundled.picture import COLORS, SHAPES
from vllm_avl.bundled.scenes import COLUMNS, ROWS

CELL = re.compile(r"what is the (\w+) of (\w+)\?")
FIELD = re.compile(r"what is the (\w+) on the \w+\?")
PLACE = re.compile(rf"at the ({'|'.join(ROWS)}) ((?:middle )?(?:left|right))\b")
# Questions about more than one object have no one place.
UNPLACED = ("is ", "which ", "in image ", "describe ")


def conditions(question: str) -> dict[str, int]:
    """Returns the class of each label that the patches asked about have."""
    if question.startswith(UNPLACED):
        return {}
    if cell := CELL.match(question):
        header, item = (word.upper() for word in cell.groups())
        return {
            "key": KEYS.index(item) + 1,
            "header": HEADERS.index(header) + 1,
            "role": VALUE,
        }
    if field := FIELD.match(question):
        return {"key": KEYS.index(field[1].upper()) + 1, "role": VALUE}
    found = {}
    for word in question.rstrip("?").split():
        if word in COLORS:
            found["color"] = list(COLORS).index(word) + 1
        if word in SHAPES:
            found["shape"] = SHAPES.index(word) + 1
    if place := PLACE.search(question):
        found["row"] = ROWS.index(place[1]) + 1
        found["column"] = COLUMNS.index(place[2]) + 1
    return found


def is_spelled(question: str) -> bool:
    """Whether the answer is read off character by character."""
    return " say?" in question or bool(FIELD.match(question) or CELL.match(question))
