"""Draws docs/images/page-*.png: the page over a real server of the small LLaVA.

cd tests && python -m page.screens ../docs/images
"""

import argparse
import io
import tempfile
from contextlib import chdir
from pathlib import Path

from PIL import Image

from benchmarks.testing import models
from page import real
from page.browser import Page, chromium

SCREENS = {
    "page-light.png": ((1280, 1500, 1.0), "light"),
    "page-dark-phone.png": ((360, 780, 2.0), "dark"),
}
COLOURS = 256


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


def main() -> None:
    """Serve, ask, and take the screens."""
    parser = argparse.ArgumentParser(prog="page.screens", description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # From its folder, so that the page shows the model's name and no path.
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        model = models.build("llava", Path("demo-llava"))
        with (
            real.serving(model, Path("log")) as server,
            chromium(Path(scratch) / "profile") as open_tab,
        ):
            for seed in (1, 2, 5):
                name, _ = real.ask(server, seed, max_tokens=120)
            address = f"{server.url}/avl/#{name}"
            for file, (size, scheme) in SCREENS.items():
                content = screen(open_tab(), address, size, scheme)
                (folder / file).write_bytes(content)
                print(f"{file}: {len(content) // 1024} KiB")


if __name__ == "__main__":
    main()
