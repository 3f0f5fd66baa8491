"""The pictures of the documentation can be drawn from the code as it is."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(FIGURES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_layout_is_drawn(tmp_path):
    file = tmp_path / "new folder" / "layout.png"
    result = run("layout.py", "--output", str(file))
    assert result.returncode == 0, result.stderr[-3000:]
    with Image.open(file) as picture:
        assert picture.width >= 900
        # getcolors gives None where there are more than it is told to count.
        colours = picture.convert("RGB").getcolors(maxcolors=64)
        assert colours is None or len(colours) > 3


def test_help_names_the_output():
    result = run("layout.py", "--help")
    assert result.returncode == 0
    assert "--output" in result.stdout
