"""The page over a real `vllm serve` and real requests."""

import httpx
import pytest

from page import real

# What the server's own client sends.
KEY = "none"
ROWS = "document.querySelector('#legend tr') !== null"


@pytest.fixture(scope="module")
def server(chromium, checkpoints, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with real.serving(checkpoints("llava"), log, "--api-key", KEY) as running:
        yield running


def counts(tab):
    return tab.ask("""Object.fromEntries(
        [...document.querySelectorAll('#legend tr')].map((row) => [
            row.querySelector('th').firstChild.textContent,
            Number(row.querySelector('.count').textContent),
        ]))""")


def test_from_no_request_to_a_drawn_one(tab, server):
    tab.open(f"{server.url}/avl/")
    tab.wait("!document.querySelector('#key-form').hidden")
    tab.type(KEY)
    tab.press("Enter")
    tab.wait("document.querySelector('#no-request').hidden === false")
    assert tab.axe() == []
    name, answer = real.ask(server, 3)
    tab.wait(ROWS)
    assert tab.text("#request-title") == f"Request {name}"
    tab.wait("document.querySelector('#step-out').textContent === '47 of 47'")
    found = counts(tab)
    assert sum(found.values()) == 576
    assert min(found.values()) > 0
    assert tab.ask("document.querySelector('#answer').textContent") == answer
    assert tab.axe() == []

    tab.tab_to("#layer")
    first = tab.picture()
    tab.press("ArrowRight")
    assert tab.text("#layer-out") == "2 of 4"
    assert counts(tab) == found
    assert tab.picture() != first
    tab.tab_to("#step")
    tab.press("Home")
    assert "after the prompt" in tab.text("#step-says")
    assert counts(tab) == found

    told = httpx.get(
        f"{server.url}/avl/requests/{name}", headers={"Authorization": f"Bearer {KEY}"}
    ).json()
    held, freed = told["num_blocks_held"], told["num_blocks_freed"]
    # Whole blocks of 32 come free, so as many rows leave in every layer.
    assert found["Evicted"] == 32 * freed
    assert f"{held} of stock's {held + freed} blocks" in tab.text("#requests")
    assert tab.text("#timeline-says").startswith(f"{held} blocks held")
    tab.wait("document.querySelector('#pool svg') !== null")


def test_the_address_of_a_request_opens_it(tab, server):
    names = [real.ask(server, seed, max_tokens=8)[0] for seed in (1, 2)]
    tab.open(f"{server.url}/avl/#{names[0]}")
    tab.wait("!document.querySelector('#key-form').hidden")
    tab.type(KEY)
    tab.press("Enter")
    tab.wait(ROWS)
    assert tab.text("#request-title") == f"Request {names[0]}"


def test_two_pictures_are_chosen_between(tab, server):
    name, _ = real.ask(server, 4, 5, max_tokens=8)
    tab.open(f"{server.url}/avl/#{name}")
    tab.wait("!document.querySelector('#key-form').hidden")
    tab.type(KEY)
    tab.press("Enter")
    tab.wait(ROWS)
    first = counts(tab)
    tab.tab_to("#picture")
    tab.press("ArrowDown")
    assert sum(counts(tab).values()) == sum(first.values()) == 576


def test_nothing_is_blocked_by_the_policy(server):
    answer = httpx.get(f"{server.url}/avl/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
