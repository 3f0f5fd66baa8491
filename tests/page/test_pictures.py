"""A picture is shown as the model saw it, whatever its file."""

import base64
import io

import numpy as np
import pytest
import transformers
from PIL import Image, ImageChops
from vllm.multimodal.media.image import ImageMediaIO

from benchmarks.testing import models
from page import files, scenes
from page.test_plot import report_of
from vllm_avl import plot
from vllm_avl.front_end.detail import _picture
from vllm_avl.front_end.geometry import VisionModel
from vllm_avl.front_end.pictures import SentPicture
from vllm_avl.front_end.records import Part
from vllm_avl.pictures import as_seen

UPRIGHT = models.random_image(5, 448, 336)
ODD = files.oddities(UPRIGHT)
TURNED = {
    f"{kind}, orientation {orientation}": files.turned(UPRIGHT, orientation, kind)
    for orientation in files.ORIENTATIONS
    for kind in ("PNG", "JPEG", "WEBP", "TIFF")
}
FILES = ODD | TURNED
RANGES = {"llava": [(5, 581)], "qwen2_5_vl": [(5, 5 + 12 * 16)]}


def opened(file):
    return Image.open(io.BytesIO(file))


def vllms(file):
    """What vLLM hands to the model."""
    return ImageMediaIO().load_bytes(file)


def shown(url):
    head, _, body = url.partition(",")
    assert head in [f"data:image/{k};base64" for k in ("png", "jpeg", "webp")]
    return opened(base64.b64decode(body))


def differs(one, other):
    """The mean difference of a channel of a pixel."""
    assert one.size == other.size
    return np.asarray(ImageChops.difference(one.convert("RGB"), other)).mean()


@pytest.mark.parametrize("name", FILES)
def test_by_hand_as_by_vllm(name):
    ours, theirs = as_seen(opened(FILES[name])), vllms(FILES[name]).media
    assert ours.mode == theirs.mode
    assert differs(ours, theirs) == 0


@pytest.mark.parametrize("name", FILES)
def test_the_page_shows_what_the_model_saw(name):
    loaded = vllms(FILES[name])
    picture = SentPicture.of(loaded)
    found = shown(picture.url)
    assert picture.size == found.size == loaded.media.size
    assert found.getexif().get(0x0112, 1) in (1, 99)
    # Without loss, but for a JPEG that has to be written again.
    assert differs(found, loaded.media) <= (2 if "jpeg" in picture.url[:16] else 0)


def test_a_file_that_a_browser_shows_alike_is_kept_as_it_is():
    for kind in ("PNG", "JPEG", "WEBP"):
        file = files.file_of(UPRIGHT, kind)
        url = SentPicture.of(vllms(file)).url
        assert base64.b64decode(url.partition(",")[2]) == file


def test_a_servers_own_background_is_shown():
    red = ImageMediaIO(rgba_background_color=(255, 0, 0)).load_bytes(ODD["alpha"])
    assert differs(shown(SentPicture.of(red).url), red.media) == 0
    assert differs(red.media, vllms(ODD["alpha"]).media) > 0


@pytest.mark.parametrize("settings", [{"image_mode": None}, {"image_mode": "L"}])
@pytest.mark.parametrize("name", ODD)
def test_a_server_that_keeps_other_colours_shows_them(name, settings):
    loaded = ImageMediaIO(**settings).load_bytes(ODD[name])
    assert shown(SentPicture.of(loaded).url).size == UPRIGHT.size


@pytest.mark.parametrize("orientation", files.ORIENTATIONS)
@pytest.mark.parametrize("family", RANGES)
def test_the_page_lays_a_turned_picture_out_as_one_turned_beforehand(
    family, orientation
):
    before, after = (
        _picture(Part(RANGES[family], SentPicture.of(vllms(file))), VisionModel(family))
        for file in (files.file_of(UPRIGHT), files.turned(UPRIGHT, orientation))
    )
    assert before.grids == after.grids
    assert (after.width, after.height) == UPRIGHT.size
    assert differs(shown(after.url), shown(before.url)) == 0


@pytest.mark.parametrize("orientation", files.ORIENTATIONS)
@pytest.mark.parametrize("family", RANGES)
def test_a_turned_picture_is_drawn_as_one_turned_beforehand(family, orientation):
    config = {
        "llava": transformers.LlavaConfig(),
        "qwen2_5_vl": transformers.Qwen2_5_VLConfig(),
    }[family]
    report = report_of(scenes.detail()) | {"vision_ranges": RANGES[family]}
    turned = opened(files.turned(UPRIGHT, orientation))
    before, after = (
        plot.overlay(report, picture, layer=1, hf_config=config)
        for picture in (UPRIGHT, turned)
    )
    assert differs(before, after) == 0
