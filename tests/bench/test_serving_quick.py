"""The serving benchmark's command line; whole runs of it need a quiet machine."""

import sys
from pathlib import Path

import preloaded

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def run(*options):
    return preloaded.run([sys.executable, SCRIPT, *options], 200)


def test_says_which_lengths_do_not_fit():
    result = run("--images", "8")
    assert result.returncode == 2
    assert "images=8" in result.stderr
    assert "4096 tokens" in result.stderr


def test_help():
    result = run("--help")
    assert result.returncode == 0
    assert "--quick" in result.stdout
