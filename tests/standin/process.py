"""Runs `standin.generate` in a process of its own, and `standin.series`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from standin.series import REPORT

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
    done = subprocess.run(
        [python, "-m", "standin.generate", str(model), "-", *options],
        input=json.dumps(spec),
        env=inherited() | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


class Series:
    """A process that answers specifications as they come, until one of them fails."""

    def __init__(self, *options: str, **environment: str) -> None:
        """Start it, with options of `standin.generate`."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "standin.series", "-", "-", *options],
            env=inherited() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def answer(self, model: Path, spec: dict[str, Any]) -> dict[str, Any]:
        """Return the report on `spec`."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(spec | {"model": str(model)}), file=self._process.stdin)
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(REPORT):
                return json.loads(line.removeprefix(REPORT))
        self._errors.seek(0)
        raise AssertionError(self._errors.read()[-4000:])

    @property
    def has_ended(self) -> bool:
        """Whether a specification has failed."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()
        self._errors.close()


def inherited() -> dict[str, str]:
    """Return the environment of a stand-in."""
    names = ("TRITON_", "STANDIN_", "VLLM_")
    ours = {name: of for name, of in os.environ.items() if not name.startswith(names)}
    return ours | {"PYTHONPATH": str(TESTS)}
