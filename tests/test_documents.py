"""Figures in the documents that follow from the plan."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_avl.config import AVLConfig, RequestOverrides
from vllm_avl.metrics.definitions import COUNTERS, GAUGES, PREFIX
from vllm_avl.plan import make_plan

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "docs" / "method.md"
PROMPT = 600
"""5 text tokens, 576 vision tokens and 19 text tokens."""


def test_the_worked_example_of_text_eviction():
    plan = make_plan(PROMPT, ((5, 581),), 32, AVLConfig(text_keep_ratio=0.7))
    window = plan.text_window

    def first_with(num_blocks):
        """Text tokens, and the window, when that many blocks have gone."""
        num_tokens = PROMPT
        while plan.num_evicted_text_blocks(num_tokens) < num_blocks:
            num_tokens += 1
        num_text = plan.num_text_tokens(num_tokens)
        return num_text, window.size(num_text)

    at_first = plan.num_text_tokens(PROMPT)
    (n, size), second, third = map(first_with, (1, 2, 3))
    expected = (
        f"At the end of the prompt n = {at_first} and R = {window.size(at_first)}. "
        f"At n = {n}, after t = {n - at_first}, R is {size}, of which "
        f"{window.num_recent(n)} are recent; "
        f"the first 32 rows leave, and {n - 32} stay. "
        f"The next blocks go at n = {second[0]} (R = {second[1]}) and "
        f"n = {third[0]} (R = {third[1]})."
    )
    assert expected in " ".join(METHOD.read_text().split())


def test_every_metric_is_in_the_table():
    rows = (ROOT / "docs" / "observing.md").read_text().splitlines()
    for kind, metrics in (("counter", COUNTERS), ("gauge", GAUGES)):
        for metric in metrics:
            assert f"| `{PREFIX}{metric.name}` | {kind} | {metric.help} |" in rows


@pytest.mark.parametrize("settings", [AVLConfig, RequestOverrides])
def test_every_setting_is_in_the_readme(settings):
    readme = (ROOT / "README.md").read_text()
    for name in settings.model_fields:
        assert f"| `{name}` |" in readme


def test_what_blocks_of_a_size_bring():
    script = ROOT / "benchmarks" / "planned.py"
    table = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True
    ).stdout
    assert table in (ROOT / "docs" / "hybrids.md").read_text()
