"""Where the vision tokens of a picture lie in it, from the sizes alone.

What a processor does to a picture follows from the picture's size, the number of tokens
that came out, and a few facts of the model. Tests compare every rule with the processor
it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, isqrt
from typing import Any

from vllm_avl.front_end.schema import Grid

Range = tuple[int, int]
Box = tuple[float, float, float, float]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MOST_TILES = 64
"""Along one edge of a picture; more than any released model takes."""


@dataclass(frozen=True)
class VisionModel:
    """What has to be known of a model.

    Attributes:
        model_type: the HF configuration's.
        tower: the vision configuration's `model_type`, where it matters.
        side: tokens along an edge of one square tile, where there are tiles.
    """

    model_type: str
    tower: str | None = None
    side: int | None = None

    @classmethod
    def of(cls, hf_config: Any) -> VisionModel:
        """Read a HF configuration."""
        vision = getattr(hf_config, "vision_config", None)
        return cls(
            str(getattr(hf_config, "model_type", "")),
            getattr(vision, "model_type", None),
            _side(hf_config, vision),
        )


def grids(
    model: VisionModel, width: int, height: int, ranges: Sequence[Range]
) -> list[Grid]:
    """Map one picture's tokens to rectangles of it.

    Args:
        model: facts of the model.
        width: of the picture as it was sent, in pixels.
        height: likewise.
        ranges: half-open ranges of positions of its vision tokens, in order.

    Returns:
        What could be placed; grids that overlap are different views of the picture.
        Empty for a model that is not known, or where the numbers do not fit.
    """
    rule = RULES.get(model.model_type)
    if rule is None or not ranges or width < 1 or height < 1:
        return []
    return list(rule(model, width, height, ranges))


def _square(
    model: VisionModel, width: int, height: int, ranges: Sequence[Range]
) -> Iterator[Grid]:
    """LLaVA-1.5: a square of tokens."""
    ((start, end),) = ranges[:1]
    side = isqrt(end - start)
    if len(ranges) > 1 or side * side != end - start:
        return
    if model.tower in (None, "clip_vision_model"):
        yield _grid(start, side, side, _centre(width, height))
    elif model.tower == "siglip_vision_model":
        yield _grid(start, side, side, WHOLE)


def _rectangle(
    model: VisionModel, width: int, height: int, ranges: Sequence[Range]
) -> Iterator[Grid]:
    """Qwen-VL since 2: rows and columns in the picture's own proportions."""
    ((start, end),) = ranges[:1]
    if len(ranges) == 1:
        rows, columns = _nearest_factors(end - start, width, height)
        yield _grid(start, rows, columns, WHOLE)


def _padded_tiles(
    model: VisionModel, width: int, height: int, ranges: Sequence[Range]
) -> Iterator[Grid]:
    """LLaVA-NeXT: the whole picture, then tiles without their padding, row by row.

    Each row of the tiles ends with a token that stands for a line break.
    """
    ((start, end),) = ranges[:1]
    side = model.side
    if len(ranges) > 1 or side is None or end - start < side * side:
        return
    yield _grid(start, side, side, WHOLE)
    start += side * side
    for tall in range(1, MOST_TILES):
        for wide in range(1, MOST_TILES // tall + 1):
            rows = _unpadded(tall * side, wide * side, height, width)
            columns = _unpadded(wide * side, tall * side, width, height)
            if len(rows) * (len(columns) + 1) == end - start:
                yield from _lines(start, rows, columns)
                return


def _marked_tiles(
    model: VisionModel, width: int, height: int, ranges: Sequence[Range]
) -> Iterator[Grid]:
    """Idefics3 and SmolVLM: a range for each tile, the whole picture last."""
    side = isqrt(ranges[0][1] - ranges[0][0])
    if {end - start for start, end in ranges} != {side * side}:
        return
    starts = [start for start, _ in ranges]
    if len(starts) > 1:
        shape = _long_edge_first(len(starts) - 1, width, height)
        if shape is None:
            return
        yield from _tiles(starts[:-1], *shape, side)
    yield _grid(starts[-1], side, side, WHOLE)


def _joined_tiles(
    model: VisionModel, width: int, height: int, ranges: Sequence[Range]
) -> Iterator[Grid]:
    """InternVL: tiles in one range, the whole picture last unless there is one tile."""
    ((start, end),) = ranges[:1]
    if len(ranges) > 1 or model.side is None or (end - start) % model.side**2:
        return
    starts = list(range(start, end, model.side**2))
    if len(starts) > 1:
        num_tiles = len(starts) - 1
        rows, columns = _nearest_shape(num_tiles, width, height)
        yield from _tiles(starts[:-1], rows, columns, model.side)
    yield _grid(starts[-1], model.side, model.side, WHOLE)


Rule = Callable[[VisionModel, int, int, Sequence[Range]], Iterator[Grid]]

RULES: dict[str, Rule] = {
    "llava": _square,
    "llava_next": _padded_tiles,
    "qwen2_vl": _rectangle,
    "qwen2_5_vl": _rectangle,
    "qwen3_vl": _rectangle,
    "qwen3_vl_moe": _rectangle,
    "idefics3": _marked_tiles,
    "smolvlm": _marked_tiles,
    "internvl": _joined_tiles,
    "internvl_chat": _joined_tiles,
}


def _side(hf_config: Any, vision: Any) -> int | None:
    """Tokens along an edge of a tile: patches, less what a projector merges."""
    size, patch = (
        _first(getattr(vision, n, None)) for n in ("image_size", "patch_size")
    )
    if not size or not patch:
        return None
    shrink = getattr(hf_config, "downsample_ratio", None) or 1
    return round(size // patch * shrink)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def _grid(start: int, rows: int, columns: int, box: Box) -> Grid:
    return Grid(start=start, rows=rows, columns=columns, box=box)


def _centre(width: int, height: int) -> Box:
    """The largest square in the middle."""
    edge = min(width, height)
    left, upper = (width - edge) / 2 / width, (height - edge) / 2 / height
    return left, upper, 1 - left, 1 - upper


def _tiles(starts: Sequence[int], rows: int, columns: int, side: int) -> Iterator[Grid]:
    for index, start in enumerate(starts):
        row, column = divmod(index, columns)
        box = column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
        yield _grid(start, side, side, box)


def _lines(
    start: int, rows: Sequence[tuple[float, float]], columns: Sequence[Any]
) -> Iterator[Grid]:
    left, right = columns[0][0], columns[-1][1]
    for upper, lower in rows:
        yield _grid(start, 1, len(columns), (left, upper, right, lower))
        start += len(columns) + 1


def _unpadded(
    canvas: int, across: int, edge: int, other: int
) -> list[tuple[float, float]]:
    """Cut one edge of a picture as it lies in the middle of a canvas of tokens.

    Args:
        canvas: tokens along this edge of the canvas.
        across: tokens along the other one.
        edge: pixels of the picture along this edge.
        other: pixels along the other one.

    Returns:
        For each token that is left when whole padding tokens are cut off, where it
        begins and ends as fractions of the picture.
    """
    if edge * across >= canvas * other:
        return [(i / canvas, (i + 1) / canvas) for i in range(canvas)]
    exact = Fraction(edge * across, other)
    padding = (canvas - int(exact)) // 2
    first = Fraction(canvas - exact) / 2
    marks = [
        min(max(float((i - first) / exact), 0.0), 1.0)
        for i in range(padding, canvas - padding + 1)
    ]
    return list(pairwise(marks))


def _factors(count: int) -> list[tuple[int, int]]:
    return [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]


def _nearest_factors(count: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns whose proportions come nearest to the picture's."""

    def stretch(shape: tuple[int, int]) -> float:
        ours, theirs = shape[1] * height, shape[0] * width
        return max(ours, theirs) / min(ours, theirs)

    return min(_factors(count), key=stretch)


def _nearest_shape(count: int, width: int, height: int) -> tuple[int, int]:
    """As `_nearest_factors`, by the difference that InternVL's tiling minimises."""
    return min(
        _factors(count), key=lambda shape: abs(width / height - shape[1] / shape[0])
    )


def _long_edge_first(count: int, width: int, height: int) -> tuple[int, int] | None:
    """Rows and columns of tiles where the long edge has whole tiles."""
    long, short = max(width, height), min(width, height)
    for along in range(1, MOST_TILES):
        across = ceil(Fraction(along * short, long))
        if along * across == count:
            return (across, along) if width >= height else (along, across)
    return None
