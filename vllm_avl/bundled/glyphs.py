"""Characters as small masks, in the font faces that come with matplotlib."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
OVERSAMPLING = 4
CAP_SHARE = 0.66
"""Height of a capital letter in its cell."""


@cache
def glyph(face: str, character: str, width: int, height: int) -> np.ndarray:
    """Returns the coverage of one character in its cell: [height, width], 0 to 1.

    Wide letters are squeezed into the cell, so that a text is a row of equal cells.
    """
    font = _font(face, round(height * CAP_SHARE * OVERSAMPLING))
    big_height = height * OVERSAMPLING
    length = max(1, round(font.getlength(character)))
    tile = Image.new("L", (length + big_height, big_height))
    baseline = round(big_height * (1 + CAP_SHARE) / 2)
    ImageDraw.Draw(tile).text(
        (big_height // 2, baseline), character, fill=255, font=font, anchor="ls"
    )
    left, _, right, _ = tile.getbbox() or (0, 0, tile.width, 0)
    ink = min(max(1, round((right - left) / OVERSAMPLING)), width)
    small = tile.crop((left, 0, right, big_height)).resize((ink, height))
    cell = np.zeros((height, width), np.float32)
    start = (width - ink) // 2
    cell[:, start : start + ink] = np.asarray(small, np.float32) / 255
    return cell


@cache
def _font(face: str, cap_height: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    probe = ImageFont.truetype(path, 100)
    _, top, _, bottom = probe.getbbox("H", anchor="ls")
    return ImageFont.truetype(path, 100 * cap_height / (bottom - top))
