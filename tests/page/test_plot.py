"""The drawing for notebooks, from the server's JSON and from a worker's report."""

import numpy as np
import pytest
import transformers
from PIL import Image, ImageChops

from page import scenes
from vllm_avl import plot
from vllm_avl.painting import OUTLINE

LLAVA = transformers.LlavaConfig()
GREY = Image.new("RGB", (336, 336), (150, 150, 150))


def report_of(detail):
    """The same request as a worker reports it."""
    told = detail.model_dump()
    ranges = told.pop("pictures")[0]["ranges"]
    for name in ("answer", "answer_tokens", "hidden"):
        del told[name]
    for layer in told["layers"]:
        del layer["rank"]
    return told | {"vision_ranges": ranges}


def cells(drawing):
    """Return the inner pixels of 24 x 24 patches, [24, 24, 8, 8]."""
    grey = np.asarray(drawing.convert("L").resize((384, 384)), dtype=float)
    return grey.reshape(24, 16, 24, 16).transpose(0, 2, 1, 3)[:, :, 4:12, 4:12]


def states_of(layer):
    """Return each patch's state, from the made-up rows themselves."""
    rows = scenes.layer_of(layer)
    named = {"C": rows.core[0], "s": rows.secondary[0], "e": rows.evicted[0]}
    flat = np.full(576, "?")
    for name, positions in named.items():
        flat[np.array(positions) - scenes.START] = name
    return flat.reshape(24, 24)


def test_states_differ_in_brightness_and_pattern():
    drawing = plot.overlay(report_of(scenes.detail()), GREY, layer=2, hf_config=LLAVA)
    assert drawing.size == (384, 384)
    inner, state = cells(drawing), states_of(2)
    mean, spread = inner.mean((2, 3)), inner.std((2, 3))
    assert set(mean[state == "C"]) == {150}
    # Dots and hatching included.
    assert 80 < mean[state == "s"].min() <= mean[state == "s"].max() < 130
    assert mean[state == "e"].max() < 55
    assert spread[state != "C"].min() > 5


def test_core_is_outlined():
    drawing = np.asarray(
        plot.overlay(report_of(scenes.detail()), GREY, hf_config=LLAVA)
    )
    state = states_of(0)
    rows, columns = np.nonzero((state[:, :-1] == "e") & (state[:, 1:] == "C"))
    assert len(rows) > 10
    for row, column in zip(rows, columns, strict=True):
        border = drawing[row * 16 + 8, column * 16 + 15]
        assert tuple(border) == OUTLINE


def test_the_servers_json_and_a_report_give_the_same_drawing():
    detail = scenes.detail()
    as_json = detail.model_dump(mode="json")
    of_server = plot.overlay(as_json, layer=1)
    picture = plot._decoded(as_json["pictures"][0]["url"])
    of_worker = plot.overlay(report_of(detail), picture, layer=1, hf_config=LLAVA)
    assert ImageChops.difference(of_server, of_worker).getbbox() is None
    assert ImageChops.difference(of_server, plot.overlay(detail)).getbbox() is not None


def test_an_earlier_step_shows_its_core():
    detail = scenes.detail()
    chosen = plot.patch_states(detail.model_dump(), layer=3, step=4)
    core = [p for p, state in chosen.items() if state is plot.State.CORE]
    assert sorted(core) == scenes.layer_of(3).history[1].core[0]
    expected = {"core": 192, "secondary": 128, "always read": 0, "evicted": 256}
    assert plot.counts(detail, layer=3, step=4) == expected


def test_heads_are_chosen():
    detail = scenes.detail(layers=[scenes.layer_of(0, heads=2)])
    first, second = (plot.patch_states(detail.model_dump(), head=h) for h in (0, 1))
    assert first != second


def test_tokens_without_a_place_are_drawn_in_reading_order():
    detail = scenes.detail(pictures=[scenes.picture(grids=[], url=None)])
    drawing = plot.overlay(detail)
    assert drawing.size == (32 * 16, 18 * 16)
    bright = np.asarray(drawing.convert("L"), dtype=float)[8::16, 4::16].flatten()
    core = np.array(scenes.layer_of(0).core[0]) - scenes.START
    assert set(np.nonzero(bright > 200)[0]) == set(core)


def test_a_sheet_shows_layers_and_counts():
    detail = scenes.detail()
    sheet, (width, height) = plot.sheet(detail), plot.overlay(detail).size
    assert sheet.width > 2 * width
    assert sheet.height > 2 * height
    assert plot.sheet(detail, layers=[1]).height < 2 * height


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer": 4}, "layers are [0, 1, 2, 3]"),
        ({"rank": 1}, "rank = 1"),
        ({"number": 1}, "1 pictures"),
    ],
)
def test_what_is_not_there_is_refused(options, says):
    with pytest.raises(ValueError, match="=") as refused:
        plot.overlay(scenes.detail(), **options)
    assert says in str(refused.value)


def test_rows_that_are_not_remembered_are_refused():
    with pytest.raises(ValueError, match="introspection"):
        plot.overlay(scenes.detail(layers=[]))
