"""Paints patches over a picture: three shadings that need no colour to be told apart.

Core is clear and outlined, secondary dimmed with dots, evicted dark and hatched, as on
the page (`front_end/static/paint.js`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

LEAST_CELL = 16
"""Pixels: smaller patches are enlarged, so that patterns can be seen."""
LARGEST = 1600
GROUND = (223, 230, 238)
OUTLINE = (255, 176, 0)
CAPTION = 22
GAP = 12

Box = tuple[int, int, int, int]


class State(Enum):
    """What became of a patch, as the page words it."""

    CORE = "core"
    SECONDARY = "secondary"
    KEPT = "always read"
    EVICTED = "evicted"


@dataclass(frozen=True)
class Patch:
    """One vision token, and where it lies as fractions of the picture."""

    position: int
    box: tuple[float, float, float, float]


def paint(
    picture: Image.Image | None, patches: Sequence[Patch], states: Mapping[int, State]
) -> Image.Image:
    """Draw `patches` over `picture`, or over a plain ground.

    Positions that `states` does not have are evicted.
    """
    base = _enlarged(picture, patches)
    boxes: dict[State, list[Box]] = {state: [] for state in State}
    for patch in patches:
        state = states.get(patch.position, State.EVICTED)
        boxes[state].append(_pixels(patch, base.size))
    masks = {state: _mask(base.size, boxes[state]) for state in State}
    seen = _mask(base.size, [_pixels(patch, base.size) for patch in patches])
    drawn = _veiled(base, ImageChops.invert(seen), (128, 136, 146), 0.88)
    drawn = _veiled(drawn, masks[State.SECONDARY], (24, 30, 38), 0.5)
    drawn = _veiled(drawn, masks[State.EVICTED], (8, 11, 16), 0.86)
    drawn = _veiled(drawn, _hatched(masks[State.EVICTED]), (255, 255, 255), 0.34)
    draw = ImageDraw.Draw(drawn)
    for left, upper, right, lower in boxes[State.SECONDARY]:
        draw.circle(((left + right) / 2, (upper + lower) / 2), 1.5, (255, 255, 255))
    drawn.paste(OUTLINE, mask=masks[State.CORE].filter(ImageFilter.MaxFilter(5)))
    clear = ImageChops.lighter(masks[State.CORE], masks[State.KEPT])
    drawn.paste(base, mask=clear)
    return drawn


def _enlarged(picture: Image.Image | None, patches: Sequence[Patch]) -> Image.Image:
    across = min(patch.box[2] - patch.box[0] for patch in patches)
    down = min(patch.box[3] - patch.box[1] for patch in patches)
    if picture is None:
        size = round(LEAST_CELL / across), round(LEAST_CELL / down)
        return Image.new("RGB", size, GROUND)
    scale = max(
        1.0, LEAST_CELL / (across * picture.width), LEAST_CELL / (down * picture.height)
    )
    scale = min(scale, max(1.0, LARGEST / max(picture.size)))
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _pixels(patch: Patch, size: tuple[int, int]) -> Box:
    width, height = size
    left, upper, right, lower = patch.box
    return (
        round(left * width),
        round(upper * height),
        round(right * width) - 1,
        round(lower * height) - 1,
    )


def _mask(size: tuple[int, int], boxes: Sequence[Box]) -> Image.Image:
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for box in boxes:
        draw.rectangle(box, fill=255)
    return mask


def _hatched(mask: Image.Image) -> Image.Image:
    lines = Image.new("L", mask.size)
    draw = ImageDraw.Draw(lines)
    for x in range(-mask.height, mask.width, 6):
        draw.line((x, mask.height, x + mask.height, 0), fill=255)
    return ImageChops.darker(lines, mask)


def _veiled(
    picture: Image.Image, mask: Image.Image, colour: tuple[int, int, int], part: float
) -> Image.Image:
    veil = Image.blend(picture, Image.new("RGB", picture.size, colour), part)
    return Image.composite(veil, picture, mask)


def mount(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Lay pictures out in two columns, each above its caption."""
    font = ImageFont.load_default(15)
    columns = min(2, len(pictures))
    width = max([one.width for one in pictures] + [ceil(font.getlength(captions[0]))])
    height = max(one.height for one in pictures) + CAPTION
    rows = ceil(len(pictures) / columns)
    size = columns * (width + GAP) + GAP, rows * (height + GAP) + GAP
    mounted = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(mounted)
    for index, (one, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, columns)
        x, y = GAP + column * (width + GAP), GAP + row * (height + GAP)
        mounted.paste(one, (x, y))
        draw.text((x, y + one.height + 3), caption, fill=(27, 35, 45), font=font)
    return mounted
