"""The page below a prefix: the server's own, or a proxy's that it may not know."""

import re
from urllib.parse import urljoin

import httpx
import pytest

from page import proxy, real

PREFIX = "/vllm"
FILES = {"main.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg"}


@pytest.fixture(scope="module", params=[PREFIX, None], ids=["told", "not_told"])
def server(request, checkpoints, tmp_path_factory):
    """A server that was told of the prefix, and one that was not."""
    options = ("--root-path", request.param) if request.param else ()
    log = tmp_path_factory.mktemp("server") / "log"
    with real.serving(checkpoints("llava"), log, *options) as running:
        yield running


@pytest.fixture(scope="module")
def nginx(server, tmp_path_factory):
    if proxy.program() is None:
        pytest.skip("no proxy: nginx is not installed")
    with proxy.proxying(server.url, PREFIX, tmp_path_factory.mktemp("nginx")) as one:
        yield one


def is_told(server):
    return "--root-path" in server.process.args


def fetched(base):
    """Load the page as a browser does; return what each address answered."""
    page = httpx.get(f"{base}/avl", follow_redirects=True)
    found = {str(page.url): page}
    queue = re.findall(r'(?:src|href)="(static/[^"]+)"', page.text)
    queue = [urljoin(str(page.url), link) for link in queue]
    while queue:
        url = queue.pop()
        if url not in found:
            found[url] = httpx.get(url)
            imports = re.findall(r'from "(\./[^"]+)"', found[url].text)
            queue += [urljoin(url, link) for link in imports]
    return found


def check(base):
    found = fetched(base)
    assert {url: one.status_code for url, one in found.items()} == dict.fromkeys(
        found, 200
    )
    assert f"{base}/avl/" in found
    kinds = {
        url.rpartition("/")[2]: one.headers["content-type"]
        for url, one in found.items()
    }
    assert {
        name: kinds[name].startswith(kind) for name, kind in FILES.items()
    } == dict.fromkeys(FILES, True)
    assert len(found) > len(FILES) + 5
    assert all(
        "default-src 'self'" in one.headers["content-security-policy"]
        for one in found.values()
    )
    assert httpx.get(f"{base}/avl/config").json()["block_size"] == 32
    assert httpx.head(f"{base}/avl/static/main.js").status_code == 200
    assert httpx.get(f"{base}/avl/static/none.js").status_code == 404


def test_without_a_prefix(server):
    check(server.url)


def test_with_the_servers_own_prefix(server):
    if not is_told(server):
        pytest.skip("the server has no prefix")
    check(server.url + PREFIX)


def test_behind_a_proxy_that_strips_its_prefix(server, nginx):
    check(nginx.strips)


def test_behind_a_proxy_that_keeps_its_prefix(server, nginx):
    if not is_told(server):
        pytest.skip("a server that does not know the prefix knows no such path")
    check(nginx.keeps)


def test_a_browser_draws_it_there(tab, server, nginx):
    for base in (nginx.strips, nginx.keeps) if is_told(server) else (nginx.strips,):
        tab.open(f"{base}/avl/")
        tab.wait("document.querySelector('#no-request').hidden === false")
        assert tab.problems == []


def test_a_file_is_not_sent_twice(server):
    first = httpx.get(f"{server.url}/avl/static/main.js")
    again = httpx.get(first.url, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_only_the_pages_own_files_are_served(server):
    for path in ("../routes.py", "%2e%2e/routes.py", "..%2froutes.py", "/etc/passwd"):
        answer = httpx.get(f"{server.url}/avl/static/{path}")
        assert answer.status_code == 404, path
