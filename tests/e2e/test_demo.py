"""`make demo`, as somebody with a fresh clone runs it."""

import re
import signal
import subprocess
import sys

import httpx
import pytest

from vllm_avl.bundled.samples import make_sample
from vllm_avl.demo import __main__ as demo
from vllm_avl.demo.server import IMPORTS, doing

COMMAND = [sys.executable, "-u", "-m", "vllm_avl.demo"]


def blocks(output: str, row: str) -> int:
    (line,) = [line for line in output.splitlines() if line.lstrip().startswith(row)]
    return int(re.split(r"\s{2,}", line.strip())[1])


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the demo printed, and what the page's server said of the request."""
    run = subprocess.Popen(
        [*COMMAND, "--images", "1", "--store-ratio", "0.25", "--wait"],
        cwd=tmp_path_factory.mktemp("demo"),
        stdout=subprocess.PIPE,
        text=True,
    )
    output = ""
    detail = None
    for line in run.stdout:
        output += line
        if "/avl/#" in line:
            server, _, name = line.split()[-1].partition("/avl/#")
            detail = httpx.get(f"{server}/avl/requests/{name}", timeout=60).json()
        if "until Ctrl-C" in line:
            # Ctrl-C may be ignored where the tests run in the background.
            run.terminate()
    assert run.wait() == 128 + signal.SIGTERM, output
    return output, detail


def test_it_says_what_it_waits_for(shown):
    output, _ = shown
    found = [output.find(f"waiting for the server, 0 s: {IMPORTS[0]}")]
    found += [output.find(f" s: {what}") for what in IMPORTS[1:]]
    assert -1 < found[0] < found[1] < found[2]


def test_what_it_waits_for_is_the_servers_last_word():
    log = "(APIServer pid=1) INFO 11-30 18:22:49 [api_utils.py:286] options\n"
    assert doing("") == IMPORTS[0]
    assert doing(log) == IMPORTS[1]
    log += "(EngineCore pid=2) INFO 11-30 18:23:02 [core.py:133] Loading\n"
    assert doing(log) == "Loading"
    log += "(EngineCore pid=2) INFO 11-30 18:23:02 [multiproc_executor.py:153] DP\n"
    assert doing(log) == IMPORTS[2]
    log += "(Worker_TP0 pid=3) INFO 11-30 18:23:22 [model.py:68] Loading weights\n \n"
    assert doing(log) == "Loading weights"


def test_the_demo_ends_with_the_page_of_its_request(shown):
    output, detail = shown
    assert "Which patches were kept: http://" in output
    assert detail["num_blocks_freed"] == 13
    assert detail["pictures"][0]["url"].startswith("data:image/png")
    assert detail["layers"][0]["evicted"][0]


def test_the_picture_of_the_test_split_is_described_rightly(shown):
    output, detail = shown
    right = make_sample("caption", "test", demo.FIRST_SCENE).references[0]
    assert detail["answer"].strip() == right
    assert "right, word for word" in output
    # What was drawn, and both answers.
    assert output.count(right) == 3, output


def test_the_demo_shows_freed_blocks(shown):
    output, _ = shown
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
