"""A policy of another package, written as the README writes it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
ASK = """
import torch
from vllm_avl.config import AVLConfig, parse_config, settings_of_request
from vllm_avl.policies import POLICIES, TokenView

assert parse_config({"avl": {"policy": "every_second"}}).policy == "every_second"
asked = settings_of_request({"avl_policy": "every_second"}, AVLConfig())
attention = torch.tensor([[0.4, 0.1, 0.2, 0.3]])
view = TokenView(
    positions=torch.arange(5, 9), attention=attention, sums=None,
    held=attention > 0, num_kept=torch.tensor([[2]]), num_scoring_rows=1, layer=0,
    num_computed=9, memo={},
)
print(POLICIES[asked.policy].score(view).argsort(descending=True).tolist())
"""


def run(folder, name="every_second", target="my_package:EverySecond"):
    """Import us beside an installed package that has one entry point."""
    (code,) = re.findall(
        r"```python\n(import torch\n.*?)```", README.read_text(), flags=re.DOTALL
    )
    (folder / "my_package.py").write_text(code)
    info = folder / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-package\nVersion: 1\n"
    )
    entry = f"[vllm_avl.policies]\n{name} = {target}\n"
    (info / "entry_points.txt").write_text(entry)
    return subprocess.run(
        [sys.executable, "-c", ASK],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_it_has_a_name_and_ranks(tmp_path):
    done = run(tmp_path)
    assert done.stdout == "[[0, 2, 3, 1]]\n", done.stderr


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "avl",
            "my_package:EverySecond",
            "policy 'avl' of my_package:EverySecond: the",
        ),
        (
            "sum",
            "builtins:sum",
            "policy 'sum': builtins:sum is no subclass of vllm_avl",
        ),
    ],
    ids=["taken", "no-policy"],
)
def test_what_is_wrong_with_it_is_said(tmp_path, name, target, message):
    done = run(tmp_path, name, target)
    assert done.returncode == 1
    assert message in done.stderr
