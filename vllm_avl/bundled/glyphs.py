"""Characters as small masks, in the font faces that come with matplotlib."""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vllm_avl.bundled.splits import Split

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-/:"

# Whole families are held out, not styles of one family.
FACES: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "DejaVuSerif-BoldItalic",
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
        "STIXGeneralBolIta",
        "cmr10",
        "cmb10",
    ),
    "test": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
        "cmss10",
        "cmtt10",
    ),
}
NUM_VARIANTS = 6
"""Of each face of the training split: slanted, wider or narrower, bolder.
Else the tower learns fourteen faces by heart and reads others worse."""
OVERSAMPLING = 4
CAP_SHARE = 0.66
"""Height of a capital letter in its cell."""


@cache
def glyph(face: str, character: str, width: int, height: int) -> np.ndarray:
    """Returns the coverage of one character in its cell: [height, width], 0 to 1.

    Wide letters are squeezed into the cell, so that a text is a row of equal cells.

    Args:
        face: Of `FACES`, or a variant of it: `face+number`.
        character: What to draw.
        width: Of the cell, in pixels.
        height: Likewise.
    """
    name, _, variant = face.partition("+")
    font = _font(name, round(height * CAP_SHARE * OVERSAMPLING))
    big_height = height * OVERSAMPLING
    length = max(1, round(font.getlength(character)))
    tile = Image.new("L", (length + big_height, big_height))
    baseline = round(big_height * (1 + CAP_SHARE) / 2)
    ImageDraw.Draw(tile).text(
        (big_height // 2, baseline), character, fill=255, font=font, anchor="ls"
    )
    if variant:
        tile = _varied(tile, baseline, zlib.crc32(face.encode()))
    left, _, right, _ = tile.getbbox() or (0, 0, tile.width, 0)
    ink = min(max(1, round((right - left) / OVERSAMPLING)), width)
    small = tile.crop((left, 0, right, big_height)).resize((ink, height))
    cell = np.zeros((height, width), np.float32)
    start = (width - ink) // 2
    cell[:, start : start + ink] = np.asarray(small, np.float32) / 255
    return cell


def choose_face(rng: np.random.Generator, split: Split) -> str:
    """Returns a face of the split; of the training split, mostly a variant."""
    face = str(rng.choice(FACES[split]))
    variant = int(rng.integers(NUM_VARIANTS + 1))
    return f"{face}+{variant}" if split == "train" and variant else face


def _varied(tile: Image.Image, baseline: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    slant, wide, tall = rng.uniform((-0.22, 0.7, 0.88), (0.22, 1.15, 1.06))
    if rng.random() < 0.4:
        tile = tile.filter(ImageFilter.MaxFilter(3))
    center = tile.width / 2
    rows = (1 / wide, slant, center - center / wide - slant * baseline)
    columns = (0, 1 / tall, baseline - baseline / tall)
    affine = Image.Transform.AFFINE
    return tile.transform(
        tile.size, affine, (*rows, *columns), Image.Resampling.BILINEAR
    )


@cache
def _font(face: str, cap_height: int) -> ImageFont.FreeTypeFont:
    # Only who draws needs it.
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    probe = ImageFont.truetype(path, 100)
    _, top, _, bottom = probe.getbbox("H", anchor="ls")
    return ImageFont.truetype(path, 100 * cap_height / (bottom - top))
