"""Draws docs/images/page-*.png: the page over a server of the bundled model.

cd tests && python -m page.screens ../docs/images
"""

import argparse
import io
import tempfile
from contextlib import chdir
from pathlib import Path

from PIL import Image

from page import real
from page.browser import Page, chromium
from vllm_avl.bundled import WEIGHTS
from vllm_avl.bundled.samples import DESCRIBE, make_sample
from vllm_avl.demo.server import Server, picture_url, user_message

SCREENS = {
    "page-light.png": ((1280, 1500, 1.0), "light"),
    "page-dark-phone.png": ((360, 780, 2.0), "dark"),
}
COLOURS = 256
NAME = "bundled"
SEEDS = 1, 5, 2
"""Of held-out captions; the page shows the last one."""


def screen(tab: Page, address: str, size: tuple[int, int, float], scheme: str) -> bytes:
    """Return a PNG of the window, in few colours to keep it small."""
    tab.size(*size)
    tab.media(prefers_color_scheme=scheme)
    tab.open(address)
    tab.wait("document.querySelector('#legend tr') !== null")
    tab.wait("document.querySelector('#pool svg') !== null")
    tab.ask("new Promise((done) => setTimeout(done, 500))")
    if size[0] < 500:
        tab.ask("document.querySelector('#request').scrollIntoView()")
    shot = Image.open(io.BytesIO(tab.picture())).convert("RGB")
    file = io.BytesIO()
    shot.quantize(COLOURS).save(file, "PNG", optimize=True)
    return file.getvalue()


def describe(server: Server, seed: int) -> str:
    """Ask for a caption of a held-out picture; return the request's id."""
    (picture,) = make_sample("caption", "test", seed).images()
    answer = server.client().chat.completions.create(
        model=NAME,
        messages=[user_message(DESCRIBE, [picture_url(picture)])],
        max_tokens=120,
        temperature=0,
    )
    return answer.id


def main() -> None:
    """Serve, ask, and take the screens."""
    parser = argparse.ArgumentParser(prog="page.screens", description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        named = ("--served-model-name", NAME)
        with (
            real.serving(WEIGHTS, Path("log"), *named) as server,
            chromium(Path(scratch) / "profile") as open_tab,
        ):
            for seed in SEEDS:
                name = describe(server, seed)
            address = f"{server.url}/avl/#{name}"
            for file, (size, scheme) in SCREENS.items():
                content = screen(open_tab(), address, size, scheme)
                (folder / file).write_bytes(content)
                print(f"{file}: {len(content) // 1024} KiB")


if __name__ == "__main__":
    main()
