"""Each supported vLLM has what we override, patch and subclass, on both platforms."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = ROOT / "deploy" / "cpu" / "compat.py"
NO_WHEEL = 3
VERSIONS = ("0.32.0", "0.33.0")

pytestmark = pytest.mark.skipif(
    sys.prefix.startswith(str(ROOT / ".compat")),
    reason="one of these vLLMs is running the tests",
)

# Imports all of ours beside a platform's vLLM; starts no engine.
COMPARE = """
import inspect, json, pkgutil, sys
from importlib import import_module
if {standin}:
    import standin.hopper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm_avl import plugin
plugin.register()
from vllm_avl.compat import patches
from vllm_avl.compat import registry
from vllm_avl.compat import versions
from vllm_avl.compat import worker_patches
names = [m.name for package in ("compat", "scheduler", "worker", "front_end") for m in
    pkgutil.walk_packages(import_module(f"vllm_avl.{{package}}").__path__,
                          f"vllm_avl.{{package}}.")
    if not any(part.startswith({others!r}) for part in m.name.split("."))]
with set_current_vllm_config(VllmConfig()):
    modules = [import_module(name) for name in names]
classes = [c for m in modules for c in vars(m).values()
    if inspect.isclass(c) and c.__module__ == m.__name__]
print("RESULT", json.dumps({{
    "version": versions.version("vllm"),
    "platform": current_platform.device_name,
    "mismatches": patches.mismatches() + worker_patches.mismatches(),
    "registered": registry.is_registered(),
    "abstract": [c.__name__ for c in classes if inspect.isabstract(c)],
    "classes": len(classes),
}}))
"""


@functools.cache
def python_of(version):
    """An interpreter with that vLLM's Python; skips where its wheel cannot be had."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("there is no .venv: run make setup")
    done = subprocess.run(
        [sys.executable, MAKE, version], capture_output=True, text=True, timeout=500
    )
    if done.returncode == NO_WHEEL:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def compare(version, standin):
    others = ("cpu",) if standin else ("cuda",)
    code = COMPARE.format(standin=standin, others=others)
    done = subprocess.run(
        [python_of(version), "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parametrize("standin", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_what_ours_was_written_for(version, standin):
    found = compare(version, standin)
    assert found["version"] == f"{version}+cpu"
    assert found["mismatches"] == []
    assert found["registered"]
    # Made into a class of its own in front of vLLM's.
    mixins = ["CUDABackend"] if standin else []
    assert found["abstract"] == mixins
    assert found["classes"] > 20
