"""The ten fixed questions: held-out pictures, text and the answer of the weights."""

import json
from pathlib import Path

from PIL import Image

from benchmarks.training.evaluate import Question

FOLDER = Path(__file__).parent / "bundled" / "questions"


def fixed_questions() -> list[Question]:
    """Read them from their files."""
    rows = json.loads((FOLDER / "questions.json").read_text())
    return [
        Question(
            [Image.open(FOLDER / name).convert("RGB") for name in row["images"]],
            row["question"],
            [row["answer"]],
            tuple(tuple(turn) for turn in row["earlier"]),
        )
        for row in rows
    ]
