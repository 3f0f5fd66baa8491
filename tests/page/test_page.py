"""The page in a real browser, over made-up requests."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from page import scenes
from vllm_avl import plot
from vllm_avl.front_end import schema
from vllm_avl.front_end.geometry import VisionModel, grids
from vllm_avl.metrics.pool import Sample

READY = "document.querySelector('#legend tr') !== null"


def legend(tab):
    """Return the counts of the legend, by name."""
    return tab.ask("""Object.fromEntries(
        [...document.querySelectorAll('#legend tr')].map((row) => [
            row.querySelector('th').firstChild.textContent,
            Number(row.querySelector('.count').textContent.replaceAll(',', '')),
        ]))""")


def core_at(number, step, head=0):
    """Return the core that the stand-in chose for a step."""
    return set(scenes.layer_of(number, head + 1).history[step // 3].core[head])


def letters(tab):
    """Return the patches as the page writes them, line by line."""
    tab.ask("document.querySelector('#map').open = true")
    return tab.wait("document.querySelector('#map pre')?.textContent").split("\n")


def shown_core(tab):
    """Return the positions that the page calls core, of a square of patches."""
    flat = "".join(letters(tab))
    return {scenes.START + index for index, letter in enumerate(flat) if letter == "C"}


@pytest.fixture
def ready(tab, server):
    tab.open(server.url)
    tab.wait(READY)
    return tab


def test_counts_are_those_of_the_rows(ready):
    assert legend(ready) == {"Core": 192, "Secondary": 128, "Evicted": 256}
    drawn = plot.counts(scenes.detail())
    assert list(legend(ready).values()) == [
        number for number in drawn.values() if number
    ]
    assert ready.text("#step-out") == "90 of 90"
    assert shown_core(ready) == core_at(0, 90)


def test_sliders_follow_the_arrow_keys(ready):
    ready.tab_to("#layer")
    ready.press("ArrowRight", "ArrowRight")
    assert ready.text("#layer-out") == "3 of 4"
    assert shown_core(ready) == core_at(2, 90)
    ready.tab_to("#step")
    ready.press("Home")
    assert ready.text("#step-out") == "0 of 90"
    assert "after the prompt" in ready.text("#step-says")
    assert shown_core(ready) == core_at(2, 0) != core_at(2, 90)
    ready.press("ArrowRight", "ArrowRight")
    assert shown_core(ready) == core_at(2, 0)
    ready.press("ArrowRight")
    assert "This step read all" in ready.text("#step-says")
    assert shown_core(ready) == core_at(2, 3)
    assert ready.text("#answer .now").strip() == scenes.WORDS[3]


def test_the_three_shadings_differ_in_brightness(tab, server, scene):
    """Over one grey picture: the mean brightness of each state is far from the others.

    Brightness is what every kind of colour blindness, and grey print, leaves.
    """
    grey = Image.new("RGB", (336, 336), (150, 150, 150))
    url = scenes.picture_url(grey)
    ranges = [(scenes.START, scenes.START + 576)]
    found = grids(VisionModel("llava"), 336, 336, ranges)
    pictures = [scenes.picture(width=336, height=336, url=url, grids=found)]
    scene.details = [scenes.detail(pictures=pictures)]
    tab.open(server.url)
    tab.wait(READY)
    tab.ask("new Promise((done) => setTimeout(done, 200))")
    area = tab.ask(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('#panels canvas').getBoundingClientRect())"
    )
    x, y, width, height = area
    shot = Image.open(io.BytesIO(tab.picture())).convert("L")
    canvas = shot.crop((round(x), round(y), round(x + width), round(y + height)))
    pixels = np.asarray(canvas.resize((24 * 20, 24 * 20)), dtype=float)
    cells = pixels.reshape(24, 20, 24, 20).transpose(0, 2, 1, 3)
    # Without the edges, where outlines are.
    inner = cells[:, :, 5:15, 5:15]
    mean, spread = inner.mean((2, 3)), inner.std((2, 3))
    state = np.array([list(line) for line in letters(tab)])
    core, secondary, evicted = (mean[state == one] for one in "Cs·")
    assert core.min() > secondary.max() + 5
    assert secondary.min() > evicted.max() + 30
    # Patterns: dots and hatching where there is one, none in core.
    assert spread[state == "C"].max() < 3
    assert min(spread[state == "s"].min(), spread[state == "·"].min()) > 8


def test_a_patch_is_named_by_the_keyboard(ready):
    ready.tab_to("#panels canvas")
    ready.press("ArrowDown")
    assert ready.text("#cell").startswith(f"Row 1, column 1 (token {scenes.START}): ")
    ready.press("ArrowDown", "ArrowRight", "ArrowRight")
    position = scenes.START + 24 + 2
    assert ready.text("#cell").startswith(f"Row 2, column 3 (token {position}): ")


def test_the_address_holds_the_chosen_request(tab, server, scene):
    scene.details = [scenes.detail("first"), scenes.detail("second/2", num_refreshes=7)]
    tab.open(server.url + "#second%2F2")
    tab.wait(READY)
    assert tab.text("#request-title") == "Request second/2"
    tab.tab_to("#requests a")
    tab.press("Enter")
    tab.wait("document.querySelector('#request-title').textContent === 'Request first'")
    assert tab.ask("location.hash") == "#first"
    current = "document.querySelector('#requests a[aria-current]').dataset.id"
    assert tab.ask(current) == "first"


def test_requests_that_share_a_name_are_told_apart(tab, server, scene):
    scene.details = [
        scenes.detail("same-1", name="same", num_refreshes=7),
        scenes.detail("same-2", name="same"),
        scenes.detail("other-1", name="other"),
    ]
    tab.open(server.url + "#same")
    tab.wait("!document.querySelector('#missing').hidden")
    assert tab.text("#missing") == "several are called same"
    listed = "[...document.querySelectorAll('#requests .id')].map((e) => e.innerText)"
    assert tab.ask(listed) == ["same-1", "same-2", "other"]
    tab.tab_to("#requests a")
    tab.press("Enter")
    tab.wait(READY)
    assert tab.text("#request-title") == "Request same-1"
    assert tab.ask("location.hash") == "#same-1"
    tab.open(server.url + "#other")
    tab.wait("document.querySelector('#request-title').textContent === 'Request other'")
    current = "document.querySelector('#requests a[aria-current]').dataset.id"
    assert tab.ask(current) == "other-1"


def test_a_request_that_is_not_known(tab, server):
    tab.open(server.url + "#gone")
    tab.wait("!document.querySelector('#missing').hidden")
    assert "no longer remembered" in tab.text("#missing")
    assert not tab.is_shown("#request")
    assert tab.is_shown("#requests a")


@pytest.mark.parametrize(
    ("remembers", "says"),
    [(16, "No request with a picture yet"), (0, '{"avl": {"introspection": 16}}')],
)
def test_no_request_yet(tab, server, scene, remembers, says):
    scene.details, scene.pool, scene.metrics = [], [], {}
    scene.remembers = remembers
    tab.open(server.url)
    tab.wait("document.querySelector('#no-request').hidden === false")
    assert says in tab.text("#no-request")
    assert tab.axe() == []
    scene.details = [scenes.detail()]
    tab.wait(READY)
    assert not tab.is_shown("#no-request")


def test_a_dead_server_and_its_return(tab, server, scene):
    tab.open(server.url)
    tab.wait(READY)
    server.stop()
    tab.wait("document.querySelector('#status').innerText.includes('not answer')")
    assert tab.is_shown("#legend")
    assert tab.axe() == []
    scene.metrics["vllm_avl_blocks_freed_early_total"] = 4321
    server.start()
    tab.wait("document.querySelector('#status').hidden")
    assert "4,321" in tab.text("#tiles")


def test_a_server_that_has_no_answer(tab, server, scene):
    scene.fault = (503, "the engine has stopped")
    tab.open(server.url)
    tab.wait("!document.querySelector('#status').hidden")
    assert "503: the engine has stopped" in tab.text("#status")
    assert tab.axe() == []


def test_the_key_is_asked_for_and_kept_in_the_tab(tab, server, scene):
    scene.key = "s3cret"
    tab.open(server.url)
    tab.wait("!document.querySelector('#key-form').hidden")
    assert not tab.is_shown("#key-wrong")
    assert tab.axe() == []
    tab.type("wrong")
    tab.press("Enter")
    tab.wait("!document.querySelector('#key-wrong').hidden")
    tab.type("s3cret")
    tab.press("Enter")
    tab.wait(READY)
    assert not tab.is_shown("#key-form")
    stored = tab.ask("[localStorage.length, document.cookie, {...sessionStorage}]")
    assert stored == [0, "", {"avl-key": "s3cret"}]


def test_heads_and_ranks_are_chosen_where_they_differ(tab, server, scene):
    layers = [scenes.layer_of(n, heads=2, rank=r) for r in (0, 1) for n in (0, 1)]
    layers[2] = replace(scenes.layer_of(3, heads=2, rank=1), layer=0)
    scene.details = [scenes.detail(layers=layers)]
    tab.open(server.url)
    tab.wait(READY)
    assert tab.text("#layer-out") == "1 of 2"
    assert shown_core(tab) == core_at(0, 90)
    for name, expected in (("head", core_at(0, 90, 1)), ("rank", core_at(3, 90, 1))):
        tab.tab_to(f"#{name}")
        tab.press("ArrowDown")
        assert shown_core(tab) == expected
    assert tab.axe() == []


def test_one_list_has_no_choice_of_heads(ready):
    assert not ready.is_shown("#head-choice")
    assert not ready.is_shown("#rank-choice")
    assert not ready.is_shown("#picture-choice")


def test_hidden_content_says_why(tab, server, scene):
    why = "This server does not keep pictures and answers."
    picture = scenes.picture(url=None)
    scene.details = [
        scenes.detail(pictures=[picture], answer=None, answer_tokens=None, hidden=why)
    ]
    tab.open(server.url)
    tab.wait(READY)
    assert tab.text("#answer-says") == why
    assert "not shown" in tab.text("#panels figcaption")
    assert legend(tab)["Core"] == 192
    assert tab.axe() == []


def test_tokens_without_a_place_are_a_strip(tab, server, scene):
    picture = scenes.picture(url=None, width=None, height=None, grids=[])
    scene.details = [scenes.detail(pictures=[picture])]
    tab.open(server.url)
    tab.wait(READY)
    assert "576 tokens in reading order" in tab.text("#panels figcaption")
    assert [len(line) for line in letters(tab)] == [32] * 18
    assert shown_core(tab) == core_at(0, 90)


def test_views_of_one_picture_and_several_pictures(tab, server, scene):
    tiles = schema.Picture(
        ranges=[(16, 212)],
        width=640,
        height=320,
        url=None,
        grids=grids(VisionModel("internvl", side=8), 640, 320, [(16, 208)]),
    )
    other = scenes.picture(ranges=[(212, 592)], grids=[])
    scene.details = [scenes.detail(pictures=[tiles, other])]
    tab.open(server.url)
    tab.wait(READY)
    captions = "[...document.querySelectorAll('figcaption')].map((c) => c.textContent)"
    first, second, rest = tab.ask(captions)
    assert re.match("View 1: 8 . 16 patches", first)
    assert re.match("View 2: 8 . 8 patches", second)
    assert rest.startswith("Tokens without a place in the picture: 4 tokens")
    tab.tab_to("#picture")
    tab.press("ArrowDown")
    assert tab.ask("document.querySelectorAll('#panels figure').length") == 1
    assert sum(legend(tab).values()) == 380


def test_all_that_is_stored_is_core(tab, server, scene):
    layers = [
        replace(
            one,
            core=[sorted(one.core[0] + one.secondary[0])],
            secondary=[[]],
            history=[],
        )
        for one in scenes.detail().layers
    ]
    scene.details = [scenes.detail(layers=layers)]
    tab.open(server.url)
    tab.wait(READY)
    assert legend(tab) == {"Core": 320, "Evicted": 256}
    assert "Every step reads all that is stored" in tab.text("#step-says")


def test_evicted_text_is_struck_out(tab, server, scene):
    aged = set(range(scenes.PROMPT, scenes.PROMPT + 32))
    layers = [
        replace(one, text=[[p for p in one.text[0] if p not in aged]])
        for one in scenes.detail().layers
    ]
    scene.details = [scenes.detail(layers=layers)]
    tab.open(server.url)
    tab.wait(READY)
    assert tab.ask("document.querySelectorAll('#answer .gone').length") == 32
    assert "32 tokens evicted" in tab.text("#answer-says")


def test_rows_that_are_not_remembered(tab, server, scene):
    scene.details = [scenes.detail(layers=[])]
    tab.open(server.url)
    tab.wait("!document.querySelector('#request-notice').hidden")
    assert "introspection" in tab.text("#request-notice")
    assert not tab.is_shown("#rows")
    assert tab.is_shown("#timeline svg")


def test_a_running_request_grows_and_keeps_what_was_chosen(tab, server, scene):
    whole = scenes.detail()
    young = {"running": True, "num_tokens": scenes.PROMPT + 30, "num_refreshes": 10}
    young["layers"] = [replace(one, history=one.history[:11]) for one in whole.layers]
    scene.details = [scenes.detail(**young)]
    tab.open(server.url)
    tab.wait(READY)
    assert tab.text("#step-out") == "30 of 30"
    tab.tab_to("#layer")
    tab.press("ArrowRight")
    scene.details = [whole]
    tab.wait("document.querySelector('#step-out').textContent === '90 of 90'")
    assert tab.text("#layer-out") == "2 of 4"


def test_charts_have_tables(ready):
    ready.ask("for (const one of document.querySelectorAll('details')) one.open = true")
    rows = """[...document.querySelectorAll('#timeline-table tbody tr')].map(
        (row) => [...row.cells].map((cell) => Number(cell.textContent)))"""
    assert ready.ask(rows) == [
        [held.num_tokens, held.held, held.stock] for held in scenes.timeline()
    ]
    ready.wait("document.querySelectorAll('#pool-table tbody tr').length === 180")
    assert ready.ask("document.querySelector('#pool svg text.name').textContent")
    assert "The pool has 120 blocks" in ready.text("#pool-says")
    assert ready.axe() == []


def test_tiles_and_reasons(ready):
    tiles = ready.text("#tiles")
    for figure in ("328", "9.8 MiB", "15.8 MiB", "41", "15 left as stock", "16 %"):
        assert figure in tiles
    assert "no picture in it" in ready.text("#reasons")


def test_engines_are_added_up(tab, server, scene):
    scene.pool = [
        Sample(time=100, engine=0, held=4, stock=7),
        Sample(time=100.4, engine=1, held=10, stock=20),
        Sample(time=101, engine=0, held=5, stock=9),
    ]
    tab.open(server.url)
    tab.wait(READY)
    says = tab.text("#pool-says")
    assert says.startswith("15 blocks held now, stock would hold 29.")
    assert "240 blocks" in says


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (768, 1024), (360, 740)], ids=str)
def test_every_size_and_scheme_passes_axe(tab, server, scene, scheme, size):
    many = [scenes.detail(f"chatcmpl-{'0123456789abcdef' * 2}-{i}") for i in range(12)]
    scene.details = many
    tab.size(*size)
    tab.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    tab.open(server.url)
    tab.wait(READY)
    assert tab.axe() == []
    assert tab.overflow() == 0


def test_controls_on_a_phone_are_large_enough_to_touch(tab, server):
    tab.size(360, 740)
    tab.open(server.url)
    tab.wait(READY)
    small = tab.ask("""
        [...document.querySelectorAll('button, select, input, summary, a')]
        .filter((one) => one.getClientRects().length > 0)
        .filter((one) => one.getBoundingClientRect().height < 28)
        .map((one) => one.outerHTML)""")
    assert small == []


def test_the_answer_plays_until_it_ends(ready):
    ready.tab_to("#step")
    ready.press("End", "ArrowLeft", "ArrowLeft")
    ready.tab_to("#play")
    ready.press("Enter")
    ready.wait("document.querySelector('#play').textContent === 'Play the answer'")
    assert ready.text("#step-out") == "90 of 90"


def test_nothing_comes_from_elsewhere(ready):
    loaded = ready.ask(
        "performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    origin = ready.ask("location.origin")
    assert len(loaded) > 8
    assert [url for url in loaded if not url.startswith((origin, "data:"))] == []
