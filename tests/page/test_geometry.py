"""Each model's tokens lie where its own processor took them from.

Pictures are smooth noise. The brightness that a token got, in the processor's
order, is compared with that of the piece of the picture where our grids put the token.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from benchmarks.testing import models
from vllm_avl.front_end.geometry import VisionModel, grids

SIZES = [(336, 336), (672, 336), (300, 900), (641, 427), (1000, 750), (97, 130)]
NAMES = ["llava", "llava_next", "qwen2_5_vl", "idefics3", "internvl"]


def noise(width, height, seed=0):
    """A grey picture that varies so smoothly that scaling changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pooled(pixels, edge):
    """[..., channels, height, width] to the mean of each square of `edge` pixels."""
    grey = torch.as_tensor(pixels).float().mean(-3)
    squares = grey.unfold(-2, edge, edge).unfold(-2, edge, edge)
    return squares.mean((-1, -2))


def llava(model, processed):
    return pooled(processed["pixel_values"][0], 14).flatten()


def llava_next(model, processed):
    patches = pooled(processed["pixel_values"][0], 14).flatten(1)[..., None]
    packed, _ = model.model.pack_image_features(
        [patches],
        processed["image_sizes"],
        "default",
        image_newline=torch.tensor([torch.nan]),
    )
    return packed[0][:, 0]


def qwen2_5_vl(model, processed):
    patches = torch.as_tensor(processed["pixel_values"]).mean(1)
    return patches.view(-1, 4).mean(1)


def idefics3(model, processed):
    return pooled(processed["pixel_values"][0], 16).flatten()


def internvl(model, processed):
    return pooled(processed["pixel_values"], 28).flatten()


class Family:
    """A small model with its processor."""

    def __init__(self, name, folder):
        self.name = name
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.config = transformers.AutoConfig.from_pretrained(folder)
        needs_model = name == "llava_next"
        self.model = (
            transformers.AutoModelForImageTextToText.from_pretrained(folder)
            if needs_model
            else None
        )
        self.image_token = getattr(self.config, "image_token_id", None)

    def process(self, picture):
        """Return the vision tokens' ranges, and the brightness that each stands for."""
        text = models.image_prompt(self.name, 1, "What?")
        inputs = self.processor(
            images=[picture.convert("RGB")], text=[text], return_tensors="pt"
        )
        (places,) = (inputs["input_ids"][0] == self.image_token).nonzero(as_tuple=True)
        places = places.tolist()
        cuts = [i for i, (a, b) in enumerate(pairwise(places), 1) if b != a + 1]
        bounds = pairwise([0, *cuts, len(places)])
        ranges = [(places[a], places[b - 1] + 1) for a, b in bounds]
        seen = globals()[self.name](self.model, inputs)
        assert len(seen) == len(places)
        return ranges, dict(zip(places, seen.tolist(), strict=True))


@pytest.fixture(scope="module", params=NAMES)
def family(request, checkpoints):
    return Family(request.param, checkpoints(request.param))


def looked_at(picture, found):
    """Return the brightness of each placed token, from the picture itself."""
    expected = {}
    for grid in found:
        left, upper, right, lower = grid.box
        box = (
            left * picture.width,
            upper * picture.height,
            right * picture.width,
            lower * picture.height,
        )
        size = (grid.columns, grid.rows)
        shrunk = picture.resize(size, Image.Resampling.BOX, box=box)
        for index, value in enumerate(np.asarray(shrunk, dtype=float).flatten()):
            expected[grid.start + index] = value
    return expected


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_lie_where_the_processor_took_them_from(family, size):
    picture = noise(*size)
    ranges, seen = family.process(picture)
    found = grids(VisionModel.of(family.config), *size, ranges)
    expected = looked_at(picture, found)
    line_breaks = {place for place, value in seen.items() if np.isnan(value)}
    assert set(expected) == set(seen) - line_breaks
    theirs = np.array([seen[place] for place in expected])
    ours = np.array(list(expected.values()))
    assert np.corrcoef(theirs, ours)[0, 1] > 0.995
    # One token further, and it shows.
    assert np.corrcoef(np.roll(theirs, 1), ours)[0, 1] < 0.99


def test_proportions_of_many_sizes(checkpoints):
    """The factors nearest to the proportions are those that Qwen-VL resized to."""
    family = Family("qwen2_5_vl", checkpoints("qwen2_5_vl"))
    processor = family.processor.image_processor
    draw = np.random.default_rng(1)
    for _ in range(150):
        width, height = (int(edge) for edge in draw.integers(60, 1600, 2))
        if max(width, height) > 6 * min(width, height):
            continue
        blank = Image.new("RGB", (width, height))
        grid = processor([blank], return_tensors="pt")["image_grid_thw"][0]
        rows, columns = (grid[1:] // 2).tolist()
        (found,) = grids(
            VisionModel("qwen2_5_vl"), width, height, [(5, 5 + rows * columns)]
        )
        assert (found.rows, found.columns) == (rows, columns), (width, height)


def test_a_siglip_tower_sees_the_whole_picture():
    (grid,) = grids(VisionModel("llava", "siglip_vision_model"), 800, 400, [(4, 733)])
    assert (grid.rows, grid.columns, grid.box) == (27, 27, (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("model", "ranges"),
    [
        (VisionModel("somebodys_vl"), [(0, 576)]),
        (VisionModel("llava"), []),
        (VisionModel("llava"), [(0, 575)]),
        (VisionModel("llava", "pixtral"), [(0, 576)]),
        (VisionModel("internvl", side=8), [(0, 65)]),
        (VisionModel("internvl"), [(0, 64)]),
        (VisionModel("idefics3"), [(0, 64), (70, 100)]),
    ],
)
def test_what_does_not_fit_is_not_placed(model, ranges):
    assert grids(model, 640, 480, ranges) == []
