"""`make demo`, as somebody with a fresh clone runs it."""

import re
import subprocess
import sys

import pytest

from vllm_avl.testing import demo


def blocks(output: str, row: str) -> int:
    (line,) = [line for line in output.splitlines() if line.lstrip().startswith(row)]
    return int(re.split(r"\s{2,}", line.strip())[1])


def test_the_demo_shows_freed_blocks(tmp_path):
    command = [sys.executable, "-m", "vllm_avl.testing.demo"]
    run = subprocess.run(
        [*command, "--images", "1", "--store-ratio", "0.25"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    output = run.stdout
    assert run.returncode == 0, f"{output}\n{run.stderr}"
    kept = blocks(output, "kept with --attention-backend avl")
    stock = blocks(output, "held by stock vLLM")
    freed = blocks(output, "freed for other requests")
    assert freed > 0, output
    assert stock == kept + freed, output
    # Three quarters of 576 vision tokens, in blocks of 32.
    assert freed == 13, output


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--store-ratio", "1.5", "must be a number in (0, 1]"),
        ("--images", "0", "must be at least 1"),
        ("--max-tokens", "1", "must be at least 100"),
    ],
)
def test_a_bad_option_is_refused_at_once(capsys, option, value, allowed):
    with pytest.raises(SystemExit, match="2"):
        demo.main([option, value])
    message = capsys.readouterr().err
    assert option in message
    assert value in message
    assert allowed in message
