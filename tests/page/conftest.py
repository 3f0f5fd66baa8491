"""Fixtures of the page's tests: a browser, a tab, and a server of made-up requests."""

from collections.abc import Iterator

import pytest

from page import browser
from page.scenes import Scene, StandIn, standing_in

DESKTOP = (1280, 900)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if browser.program() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.PROGRAMS)} is installed")
    pytest.importorskip("axe_playwright_python", reason="brings axe-core")
    with browser.chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(chromium) -> Iterator[browser.Page]:
    """A fresh tab on a desktop; nothing may go wrong in it."""
    page = chromium()
    page.size(*DESKTOP)
    page.media(prefers_color_scheme="light")
    yield page
    assert page.problems == []


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def server(scene) -> Iterator[StandIn]:
    with standing_in(scene) as running:
        yield running
