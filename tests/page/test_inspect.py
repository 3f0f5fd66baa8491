"""`python -m vllm_avl.inspect`, as somebody types it."""

import subprocess
import sys

import preloaded
import pytest
from PIL import Image

from benchmarks.testing import models
from vllm_avl import inspect


def run(folder, *options):
    command = [sys.executable, "-m", "vllm_avl.inspect", folder / "in.png"]
    return preloaded.run([*command, "What is it?", *options], 500)


def test_the_demo_model_is_drawn(tmp_path):
    models.random_image(3, 448, 336).save(tmp_path / "in.png")
    drawn_to = tmp_path / "out.png"
    done = run(tmp_path, "--core-ratio", "0.3", "--layer", "2", "--output", drawn_to)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    (counts,) = [row for row in rows if row[:1] == ["2"] and len(row) == 5]
    assert sum(map(int, counts[1:])) == 576
    assert min(map(int, counts[1:])) > 0
    assert "8 given back" in done.stdout
    drawn = Image.open(drawn_to)
    assert drawn.width > 448


def test_a_request_served_as_stock_is_said_so(tmp_path):
    models.random_image(3).save(tmp_path / "in.png")
    done = run(tmp_path, "--store-ratio", "1.0")
    assert done.returncode == 1
    assert "served exactly as stock" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--store-ratio", "1.5"], "--store-ratio = 1.5: must be"),
        (["--core-ratio", "0.9"], "--core-ratio = 0.9"),
        (["--policy", "best"], "--policy = 'best'"),
        (["--layer", "0"], "--layer = 0: must be at least 1"),
        (["--max-tokens", "1"], "--max-tokens = 1: must be at least 2"),
        (["--output", "nowhere/out.png"], "nowhere is not a folder"),
    ],
)
def test_a_bad_option_is_refused_at_once(capsys, options, says):
    with pytest.raises(SystemExit, match="2"):
        inspect.main(["in.png", "What?", *options])
    assert says in capsys.readouterr().err


def test_what_is_no_picture_is_refused(tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path in (text, tmp_path / "missing.png"):
        assert inspect.main([str(path), "What?"]) == 1
        assert str(path) in capsys.readouterr().err


def test_the_standard_library_keeps_its_name():
    code = "import inspect, vllm_avl.inspect; print(inspect.getfile(inspect))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "vllm_avl" not in done.stdout
    assert done.returncode == 0, done.stderr
