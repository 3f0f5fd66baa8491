"""The page shows vision tokens with the picture that the model saw there."""

import base64
import io

import numpy as np
import pytest
from kept_content import detail, part, picture, post, serving
from page import files
from PIL import Image, ImageChops

from benchmarks.testing import models
from vllm_avl import plot
from vllm_avl.demo.server import data_url, json_option
from vllm_avl.pictures import as_seen

UPRIGHT = models.random_image(5, 448, 336)
TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def server(request, checkpoints, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    limits = json_option("--limit-mm-per-prompt", {"image": 4, "video": 1})
    more = limits if request.param == "qwen2_5_vl" else ()
    with serving(checkpoints(request.param), log, *more, store_ratio=0.3) as one:
        yield one


def shown(server, parts, **changes):
    """Return a request as the page gets it."""
    answer = post(server, parts, **changes)
    assert answer.status_code == 200, answer.text
    return detail(server, answer.json()["avl"][0]["id"])


def pixels(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def same(one, other):
    return one.size == other.size and not ImageChops.difference(one, other).getbbox()


def test_a_turned_picture_is_shown_as_one_turned_beforehand(server):
    before = shown(server, [part(data_url(files.file_of(UPRIGHT))), TEXT])
    (expected,) = before.pictures
    assert expected.grids
    drawn = plot.overlay(before)
    for orientation in files.ORIENTATIONS:
        file = files.turned(UPRIGHT, orientation)
        after = shown(server, [part(data_url(file)), TEXT])
        (found,) = after.pictures
        assert found.model_dump(exclude={"url"}) == expected.model_dump(exclude={"url"})
        assert same(pixels(found.url), UPRIGHT)
        assert same(plot.overlay(after), drawn)


def test_odd_colours_are_shown_as_the_model_saw_them(server):
    for name in ("16 bits", "translucent palette", "CMYK, no loss"):
        file = files.oddities(UPRIGHT)[name]
        (found,) = shown(server, [part(data_url(file)), TEXT]).pictures
        assert same(pixels(found.url), as_seen(Image.open(io.BytesIO(file))))


def test_parts_without_a_type_are_pictures_too(server):
    untyped = {"image_url": {"url": picture(1)}}
    found = shown(server, [untyped, part(picture(2)), TEXT])
    assert [one.url for one in found.pictures] == [picture(1), picture(2)]


def test_a_picture_that_comes_twice(server):
    found = shown(server, [part(picture(n)) for n in (1, 2, 1)] + [TEXT])
    assert [one.url for one in found.pictures] == [picture(n) for n in (1, 2, 1)]


def test_pictures_of_a_stream_are_shown(server):
    raw = post(
        server,
        [part(picture(3)), TEXT],
        stream=True,
        stream_options={"include_usage": True},
    )
    name = raw.text.split('"id":"')[1].split('"')[0]
    found = detail(server, name)
    assert [one.url for one in found.pictures] == [picture(3)]
    assert found.answer


def test_a_picture_that_its_client_named_is_not_shown(server):
    """The engine may know another one by that name, and then the model saw that."""
    first = shown(server, [part(picture(1), uuid="mine"), part(picture(4)), TEXT])
    second = shown(server, [part(picture(2), uuid="mine"), part(picture(4)), TEXT])
    for found in (first, second):
        assert [one.url for one in found.pictures] == [None, picture(4)]


def test_a_video_in_front_of_a_picture(server):
    if "qwen" not in server.model:
        pytest.skip("the model takes no videos")
    frames = [np.asarray(models.random_image(seed, 224, 224)) for seed in range(4)]
    encoded = [
        base64.b64encode(files.file_of(Image.fromarray(frame), "JPEG")).decode()
        for frame in frames
    ]
    url = f"data:video/jpeg;base64,{','.join(encoded)}"
    # The small model's chat template knows pictures alone.
    place = {"type": "text", "text": "<|vision_start|><|video_pad|><|vision_end|>"}
    video = [{"type": "video_url", "video_url": {"url": url}}, place]
    for order, urls in (
        ([*video, part(picture(6))], [None, picture(6)]),
        ([part(picture(6)), *video], [picture(6), None]),
    ):
        found = shown(server, [*order, TEXT])
        assert [one.url for one in found.pictures] == urls
        sizes = [sum(b - a for a, b in one.ranges) for one in found.pictures]
        assert sum(sizes) == found.num_vision_tokens
        drawn = [sum(g.rows * g.columns for g in one.grids) for one in found.pictures]
        assert drawn == [n if url else 0 for n, url in zip(sizes, urls, strict=True)]
