"""What users do who have too little memory: smaller pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from PIL import Image

from benchmarks.training.evaluate import Question


def shrunk(asked: Sequence[Question], pixels: float) -> Sequence[Question]:
    """Return the questions with a share of the pixels of their pictures."""
    if pixels == 1:
        return asked
    return [
        replace(question, images=[_shrunk(image, pixels) for image in question.images])
        for question in asked
    ]


def _shrunk(image: Image.Image, pixels: float) -> Image.Image:
    width, height = (round(edge * sqrt(pixels)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
