"""Every operation and its oracle take the same arguments."""

import inspect
from importlib import import_module

import pytest
from vllm_avl.kernels.cuda import reference

MODULES = {
    "vision_scores": "vision_scores",
    "copy_rows": "copy_rows",
    "rank_rows": "rank_rows",
    "select_core": "select_core",
}


@pytest.mark.parametrize("name", MODULES)
def test_reference_has_the_same_signature(name):
    ours = getattr(import_module(f"vllm_avl.kernels.cuda.{MODULES[name]}"), name)
    assert inspect.signature(ours) == inspect.signature(getattr(reference, name))
