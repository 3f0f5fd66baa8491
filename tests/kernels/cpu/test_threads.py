"""Loops that another process has left on disk."""

import os
import subprocess
import sys

import pytest
import torch
from vllm_avl.kernels import cpu

COPY = """
import sys, torch
from vllm_avl.kernels import cpu
from vllm_avl.kernels.cpu import reference

zero = torch.zeros(1, dtype=torch.int32)
slots = [torch.tensor([[slot]], dtype=torch.int32) for slot in (3, 5)]
for dtype in sys.argv[1:]:
    cache = torch.arange(2 * 2 * 32 * 64).to(getattr(torch, dtype)).view(2, 1, 2, -1)
    expected = cache.clone()
    cpu.copy_rows(cache, 64, zero, slots[0], zero + 1, slots[1])
    reference.copy_rows(expected, 64, zero, slots[0], zero + 1, slots[1])
    assert torch.equal(cache, expected), dtype
"""


def test_loops_from_disk_serve_their_own_dtype(tmp_path):
    """Numba's names of functions have passed one dtype's loop for another's."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for dtypes in (["int16"], ["uint8", "int16"], ["int32", "uint8", "int16"]):
        command = [sys.executable, "-c", COPY, *dtypes]
        subprocess.run(command, env=environment, check=True)
    assert list(tmp_path.rglob("*.nbc"))


def test_a_dtype_without_loops_is_refused():
    with pytest.raises(ValueError, match="float64"):
        cpu.start(torch.float64)
