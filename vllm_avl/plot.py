"""Draws which patches of a picture a request reads, stores and has evicted.

For notebooks: the page `/avl/` shows the same. `overlay` takes a request as
`/avl/requests/{id}` answers it, or as a worker's `avl_report` does:

    overlay(httpx.get(f"{server}/avl/requests/{name}").json(), layer=3)
    overlay(llm.collective_rpc("avl_report", args=(name,))[0], picture, layer=3,
            hf_config=llm.llm_engine.model_config.hf_config)
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from math import ceil
from typing import Any

from PIL import Image
from pydantic import BaseModel

from vllm_avl.front_end.geometry import VisionModel, grids
from vllm_avl.front_end.schema import Grid
from vllm_avl.painting import Patch, State, mount, paint
from vllm_avl.pictures import as_seen

STRIP_COLUMNS = 32


def overlay(
    request: Any,
    picture: Image.Image | None = None,
    *,
    layer: int = 0,
    step: int | None = None,
    head: int = 0,
    rank: int = 0,
    number: int = 0,
    hf_config: Any = None,
) -> Image.Image:
    """Shade one picture's patches.

    Core is clear and outlined, secondary dimmed with dots, evicted dark and hatched.
    Tokens whose place in the picture is not known are drawn in reading order.

    Args:
        request: of the server, or of a worker.
        picture: that was asked about, turned by its EXIF data as vLLM turned it; by
            default the one that the server kept.
        layer: counted from 0.
        step: decode step after which core is shown, 0 for the prompt; by default now.
        head: KV head, where heads store other tokens than each other.
        rank: tensor-parallel rank.
        number: of the picture in the prompt, counted from 0.
        hf_config: the model's, to lay out a worker's report.

    Raises:
        ValueError: there is no such layer or picture.
    """
    fields = _fields(request)
    ranges, laid_out, kept = _picture(fields, number)
    picture = picture or kept
    if picture is not None:
        picture = as_seen(picture)
    if not laid_out and picture is not None and hf_config is not None:
        model = VisionModel.of(hf_config)
        laid_out = grids(model, picture.width, picture.height, ranges)
    patches = list(_placed(_one_view(laid_out)))
    if not patches:
        picture, patches = None, list(_strip(ranges))
    states = patch_states(fields, layer=layer, step=step, head=head, rank=rank)
    return paint(picture, patches, states)


def counts(
    request: Any, *, layer: int = 0, step: int | None = None, number: int = 0
) -> dict[str, int]:
    """Count one picture's patches by what became of them."""
    fields = _fields(request)
    ranges, _, _ = _picture(fields, number)
    states = patch_states(fields, layer=layer, step=step)
    found = [states.get(p, State.EVICTED) for pair in ranges for p in range(*pair)]
    return {state.value: found.count(state) for state in State}


def sheet(
    request: Any,
    picture: Image.Image | None = None,
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Image.Image:
    """Draw several layers beside each other, with captions and counts.

    Args:
        request: as for `overlay`.
        picture: likewise.
        layers: counted from 0; by default four, from the first to the last.
        options: of `overlay`.
    """
    chosen = spread(num_layers(request)) if layers is None else layers
    pictures = [overlay(request, picture, layer=n, **options) for n in chosen]
    taken = {name: options[name] for name in ("step", "number") if name in options}
    captions = [
        f"layer {n + 1}: " + _words(counts(request, layer=n, **taken)) for n in chosen
    ]
    return mount(pictures, captions)


def num_layers(request: Any) -> int:
    """Return how many layers a request reports."""
    return len({layer["layer"] for layer in _fields(request)["layers"]})


def patch_states(
    fields: Mapping[str, Any],
    *,
    layer: int = 0,
    step: int | None = None,
    head: int = 0,
    rank: int = 0,
) -> dict[int, State]:
    """Return what became of each position; what is missing has been evicted."""
    rows = _rows(fields, layer, rank)
    states: dict[int, State] = {}

    def mark(lists: Sequence[Sequence[int]], state: State) -> None:
        chosen = lists[head] if head < len(lists) else next(iter(lists), ())
        states.update(dict.fromkeys(chosen, state))

    mark(rows["text"], State.KEPT)
    mark(rows["secondary"], State.SECONDARY)
    mark(rows["core"], State.CORE)
    earlier = _selected(rows["history"], fields["num_prompt_tokens"], step)
    if earlier is not None:
        mark(rows["core"], State.SECONDARY)
        mark(earlier, State.CORE)
    return states


def _selected(
    history: Sequence[Mapping[str, Any]], num_prompt_tokens: int, step: int | None
) -> Sequence[Sequence[int]] | None:
    """Core as it was after a step; None where that is as now."""
    if step is None:
        return None
    made = [s["core"] for s in history if s["num_tokens"] <= num_prompt_tokens + step]
    return made[-1] if made else None


def _fields(request: Any) -> Mapping[str, Any]:
    if isinstance(request, BaseModel):
        return request.model_dump()
    if is_dataclass(request) and not isinstance(request, type):
        return asdict(request)
    return request


def _rows(fields: Mapping[str, Any], layer: int, rank: int) -> Mapping[str, Any]:
    if not fields["layers"]:
        raise ValueError(
            "the request's rows are not remembered: give the engine "
            '{"avl": {"introspection": 1}}'
        )
    for rows in fields["layers"]:
        if rows["layer"] == layer and rows.get("rank", rank) == rank:
            return rows
    known = sorted({rows["layer"] for rows in fields["layers"]})
    raise ValueError(f"layer = {layer}, rank = {rank}: layers are {known}")


def _picture(
    fields: Mapping[str, Any], number: int
) -> tuple[list[tuple[int, int]], list[Grid], Image.Image | None]:
    """Return a picture's ranges, what is known of its layout, and itself if kept."""
    if "pictures" not in fields:
        return [tuple(pair) for pair in fields["vision_ranges"]], [], None
    pictures = fields["pictures"]
    if not 0 <= number < len(pictures):
        raise ValueError(f"number = {number}: the request has {len(pictures)} pictures")
    one = pictures[number]
    laid_out = [Grid(**grid) for grid in one["grids"]]
    ranges = [tuple(pair) for pair in one["ranges"]]
    return ranges, laid_out, _decoded(one["url"])


def _decoded(url: str | None) -> Image.Image | None:
    if url is None:
        return None
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def _one_view(laid_out: Sequence[Grid]) -> list[Grid]:
    """Of grids that overlap, which are views of the same picture, the finest."""
    views: list[list[Grid]] = []
    for grid in laid_out:
        if views and not any(_overlap(grid, other) for other in views[-1]):
            views[-1].append(grid)
        else:
            views.append([grid])
    return max(views, key=lambda v: sum(g.rows * g.columns for g in v), default=[])


def _overlap(one: Grid, other: Grid) -> bool:
    width = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    height = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
    return min(width, height) > 1e-6


def _placed(laid_out: Sequence[Grid]) -> Iterator[Patch]:
    for grid in laid_out:
        left, upper, right, lower = grid.box
        width, height = (right - left) / grid.columns, (lower - upper) / grid.rows
        for index in range(grid.rows * grid.columns):
            row, column = divmod(index, grid.columns)
            x, y = left + column * width, upper + row * height
            yield Patch(grid.start + index, (x, y, x + width, y + height))


def _strip(ranges: Sequence[tuple[int, int]]) -> Iterator[Patch]:
    positions = [position for pair in ranges for position in range(*pair)]
    columns = min(STRIP_COLUMNS, len(positions))
    rows = ceil(len(positions) / columns)
    for index, position in enumerate(positions):
        row, column = divmod(index, columns)
        box = column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
        yield Patch(position, box)


def spread(size: int) -> list[int]:
    """Up to four numbers from 0 to `size` - 1, evenly spread."""
    count = min(4, size)
    return sorted({round(i * (size - 1) / max(1, count - 1)) for i in range(count)})


def _words(found: Mapping[str, int]) -> str:
    shown = [f"{number} {name}" for name, number in found.items() if number]
    return ", ".join(shown)
