"""Runs `standin.generate` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
TIMEOUT = 900
# No compilation: full graphs where a step is one of decode rows alone, else none.
GRAPHS = {
    "enforce_eager": False,
    "kernel_config": {"enable_jit_warmup": False},
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    },
}


def generate(
    model: Path,
    spec: dict[str, Any],
    *options: str,
    python: str = sys.executable,
    **environment: str,
) -> dict[str, Any]:
    """Let `python` answer `spec`, see `standin.generate`; return its report."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TRITON_", "STANDIN_", "VLLM_"))
    }
    inherited["PYTHONPATH"] = str(TESTS)
    done = subprocess.run(
        [python, "-m", "standin.generate", str(model), "-", *options],
        input=json.dumps(spec),
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
