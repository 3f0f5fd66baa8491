"""A picture that knows what every one of its patches shows."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from vllm_avl.bundled.glyphs import CHARACTERS, glyph

SIZE, PATCH = 192, 8
GRID = SIZE // PATCH
NUM_PATCHES = GRID * GRID

COLORS = {
    "red": (215, 30, 35),
    "green": (20, 145, 50),
    "blue": (35, 70, 215),
    "yellow": (225, 185, 0),
    "orange": (245, 115, 10),
    "purple": (130, 40, 170),
    "black": (25, 25, 25),
    "cyan": (0, 175, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
SIZES = ("small", "large")

# What a patch can be: classes of each label, 0 is always "nothing".
LABELS = {
    "character": len(CHARACTERS) + 1,
    "index": 9,
    "color": len(COLORS) + 1,
    "shape": len(SHAPES) + 1,
    "size": len(SIZES) + 1,
    "row": 5,
    "column": 5,
    "same_color": 7,
    "same_shape": 7,
    "key": 48,
    "header": 8,
    "role": 4,
}
POLYGONS = {
    "triangle": ((0.5, 0.02), (0.98, 0.95), (0.02, 0.95)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "star": tuple(
        (0.5 + r * np.sin(np.pi * i / 5), 0.52 - r * np.cos(np.pi * i / 5))
        for i, r in enumerate((0.52, 0.26) * 5)
    ),
    "cross": tuple(
        (x / 100, y / 100)
        for x, y in (
            *((30, 0), (70, 0), (70, 30), (100, 30), (100, 70), (70, 70)),
            *((70, 100), (30, 100), (30, 70), (0, 70), (0, 30), (30, 30)),
        )
    ),
}


@cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Returns the coverage of a shape: [size, size], 0 to 1."""
    big = size * 4
    tile = Image.new("L", (big, big))
    draw = ImageDraw.Draw(tile)
    if shape == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif shape == "square":
        edge = big // 14
        draw.rectangle((edge, edge, big - edge, big - edge), fill=255)
    else:
        draw.polygon([(x * big, y * big) for x, y in POLYGONS[shape]], fill=255)
    return np.asarray(tile.resize((size, size)), np.float32) / 255


@dataclass
class Picture:
    """Pixels and labels under construction.

    Attributes:
        pixels: [SIZE, SIZE, 3], 0 to 255.
        labels: [GRID, GRID] of classes for each key of `LABELS`.
        shown: [GRID, GRID], whether anything but the background is in a patch.
    """

    rng: np.random.Generator
    pixels: np.ndarray = field(init=False)
    labels: dict[str, np.ndarray] = field(init=False)
    shown: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        light = self.rng.integers(225, 256, 3)
        self.pixels = np.tile(light.astype(np.float32), (SIZE, SIZE, 1))
        self.labels = {name: np.zeros((GRID, GRID), np.int64) for name in LABELS}
        self.shown = np.zeros((GRID, GRID), bool)

    def ink(self, color: str) -> np.ndarray:
        """Returns a shade of a named colour: [3]."""
        shade = np.array(COLORS[color]) + self.rng.integers(-14, 15, 3)
        return np.clip(shade, 0, 255).astype(np.float32)

    def stamp(self, mask: np.ndarray, x: int, y: int, ink: np.ndarray) -> None:
        """Draws a mask with its upper left corner at (x, y)."""
        height, width = mask.shape
        area = self.pixels[y : y + height, x : x + width]
        area += mask[: area.shape[0], : area.shape[1], None] * (ink - area)
        rows = slice(y // PATCH, (y + height - 1) // PATCH + 1)
        columns = slice(x // PATCH, (x + width - 1) // PATCH + 1)
        self.shown[rows, columns] = True

    def mark(self, x: int, y: int, width: int, height: int, **classes: int) -> None:
        """Labels the patches whose centre lies in a box."""
        rows = slice((y + PATCH // 2 - 1) // PATCH, (y + height + 3) // PATCH)
        columns = slice((x + PATCH // 2 - 1) // PATCH, (x + width + 3) // PATCH)
        for name, value in classes.items():
            self.labels[name][rows, columns] = value

    def text(
        self,
        text: str,
        x: int,
        y: int,
        cell: tuple[int, int],
        face: str,
        ink: np.ndarray,
        **classes: int,
    ) -> None:
        """Writes `text`, one cell a character, and labels it."""
        width, height = cell
        for index, character in enumerate(text):
            left = x + index * width
            if character == " ":
                continue
            self.stamp(glyph(face, character, width, height), left, y, ink)
            self.mark(
                left,
                y,
                width,
                height,
                character=CHARACTERS.index(character) + 1,
                index=min(index + 1, LABELS["index"] - 1),
                **classes,
            )

    def image(self) -> Image.Image:
        """Returns the picture with a little noise, as a camera would."""
        noise = self.rng.normal(0, self.rng.uniform(0, 5), self.pixels.shape)
        pixels = np.clip(self.pixels + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(pixels)
