"""What protects a user's data is no `assert`: it holds under `python -O` too."""

import subprocess
import sys

import pytest

UNNUMBERED = """
from vllm_avl.layers import check_layer_names
check_layer_names(["model.first.attn", "model.second.attn"])
"""
AMBIGUOUS = """
from vllm_avl.layers import check_layer_names
check_layer_names(["layers.0.sub.0.attn", "layers.1.sub.1.attn"])
"""
SHARED = """
from types import SimpleNamespace
from vllm.v1.core.block_pool import BlockPool
from vllm_avl.scheduler.manager import Adapted, AVLManager
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan

plan = make_plan(600, [(5, 581)], 32, AVLConfig())
manager = AVLManager.__new__(AVLManager)
manager.block_pool = BlockPool(40, False, 32)
manager.enable_caching, manager.writes_prompts = False, True
manager.adapted = {"a": Adapted(SimpleNamespace(request_id="a"), plan)}
manager.req_to_blocks = {"a": manager.block_pool.get_new_blocks(19)}
for block in manager.req_to_blocks["a"][:12]:
    block.ref_cnt = 2
manager._choose_targets("a")
"""


@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        pytest.param(UNNUMBERED, "layers are numbered", id="layers-without-a-number"),
        pytest.param(AMBIGUOUS, "layers are numbered", id="layers-with-two"),
        pytest.param(SHARED, "would write blocks that others read", id="shared-blocks"),
    ],
)
def test_it_is_refused_without_asserts(code, refusal):
    result = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=200
    )
    assert result.returncode != 0
    assert refusal in result.stderr.splitlines()[-1]
