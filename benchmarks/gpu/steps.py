"""What a run on a GPU does, in the order of its worth, and on the stand-in for one.

The limits are for one H100 or H200 with 16 cores. Together they are more than a run
has, since few steps come near to theirs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import headlines
from environment import ROOT, python_of
from runner import Step

BENCHMARKS = ROOT / "benchmarks"
GPU_TESTS = "tests/gpu"
KERNEL_TESTS = "tests/kernels/cuda"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Else vLLM's sampler wants FlashInfer, which the environment may lack.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "PYTHONUNBUFFERED": "1",
}
STANDIN = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# About a quarter: each kernel, and of the two that have many shapes the odd ones.
QUARTER = " or ".join(
    [
        "(test_selected_attention.py and (ragged or mha or head-80 or lists-per-head))",
        "(test_selected_attention.py and scored-query-rows)",
        "(test_vision_scores.py and (group-3 or head-96 or not twice_eager))",
        "test_rank_rows.py",
        "test_select_core.py",
        "(test_copy_rows.py and not first_slots)",
        "test_another_prompt",
    ]
)
# A machine is rare: one failure is not all there is to learn.
SOME_FAIL = ("--maxfail", "10", "--continue-on-collection-errors")
# Full graphs of decode steps, and no compilation, which would take a minute a server.
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32],
}


@dataclass(frozen=True)
class Paths:
    """Where a run finds and leaves things, all absolute.

    Attributes:
        work: kept between runs: the environment is made once.
        bundle: see `environment`; None to use this Python's packages.
        wheels: see `environment`.
    """

    work: Path
    bundle: Path | None = None
    wheels: Path | None = None

    @property
    def run(self) -> Path:
        """Of this run: logs and the steps' working directory, made anew.

        Not the clone, one of whose folders has the name of a package on PyPI.
        """
        return self.work / "run"

    @property
    def results(self) -> Path:
        """CSV rows and plots of the benchmarks."""
        return self.run / "results"

    @property
    def environment(self) -> Path:
        """The virtual environment, if one is made."""
        return self.work / "environment"

    @property
    def python(self) -> str:
        """The interpreter of all steps but the first."""
        return str(python_of(self.environment, self.bundle, self.wheels))


def make_steps(paths: Paths, rehearse: bool) -> list[Step]:
    """Return the steps on a GPU, or what can be rehearsed of each without one."""
    shared = ENVIRONMENT | (STANDIN if rehearse else {})
    first = Step("environment", make_environment(paths), 60, headlines.machine, shared)
    chosen = standin_steps if rehearse else gpu_steps
    return [first, *chosen(paths, shared)]


def make_environment(paths: Paths) -> list[str]:
    """Return the command that makes and describes the environment."""
    options = {"--bundle": paths.bundle, "--wheels": paths.wheels}
    given = [str(x) for pair in options.items() if pair[1] for x in pair]
    script = str(BENCHMARKS / "gpu" / "environment.py")
    return [sys.executable, script, str(paths.environment), *given]


def gpu_steps(paths: Paths, shared: Mapping[str, str]) -> list[Step]:
    """Return all steps that need a GPU."""
    run = Commands(paths)
    rows, served = headlines.Rows(paths.results), "llava-1.5-7b"
    graphs = ["--compilation-config", json.dumps(GRAPHS)]
    bundled = [("vllm-kernels", run.bundled_checks(), 40, headlines.checks)]
    listed = [
        ("smoke", run.smoke(), 75, headlines.last_words),
        (
            "kernels",
            run.tests(KERNEL_TESTS, *SOME_FAIL, "-n", "8", "-k", QUARTER),
            70,
            headlines.tests,
        ),
        (
            "engine",
            # Each in a worker of its own: what takes long is starting engines.
            run.tests(GPU_TESTS, "-v", "-n", "13", "-k", "v2 or one_give or compiled"),
            130,
            headlines.tests,
        ),
        (
            "attention",
            run.attention("mha", ("32", "16"), ("1", "2")),
            50,
            lambda _: rows.attention(32),
        ),
        ("compaction", run.kernels("compaction"), 40, lambda _: rows.compaction()),
        (
            "decode",
            run.serving(
                *(served, "latency", "--concurrency", "32", "--rounds", "1"),
                *("--settings", "0.5,0.3,3", "--output-tokens", "384", *graphs),
            ),
            150,
            lambda _: rows.decode(),
        ),
        (
            "pool",
            run.serving(
                *(served, "throughput", "--requests", "32"),
                *("--settings", "0.5", "--together", *graphs),
            ),
            130,
            lambda _: rows.pool(),
        ),
        (
            "attention-gqa",
            run.attention("gqa", ("32",), ("2", "4", "8")),
            50,
            lambda _: rows.attention(28),
        ),
        *(bundled if run.bundled_checks() else []),
    ]
    return [Step(*parts, shared) for parts in listed]


def standin_steps(paths: Paths, shared: Mapping[str, str]) -> list[Step]:
    """Return the same steps as far as they go without a GPU, small."""
    run = Commands(paths)
    rows, small = headlines.Rows(paths.results), ("--interpret", "--shapes", "gqa")
    served = ("--output-tokens", "16", "--enforce-eager")
    listed = [
        ("smoke", run.smoke("--standin"), 240, headlines.last_words),
        (
            "kernels",
            run.tests(
                KERNEL_TESTS, *SOME_FAIL, "-k", "select_core or (ragged and dtype1)"
            ),
            240,
            headlines.tests,
        ),
        ("engine", run.tests(GPU_TESTS, "--collect-only"), 240, headlines.tests),
        ("attention", run.kernels("attention", *small), 240, headlines.last_words),
        ("compaction", run.kernels("compaction", *small), 240, headlines.last_words),
        (
            "decode",
            run.serving(
                *("tiny", "latency", "--concurrency", "2", "--rounds", "1"),
                *("--settings", "0.5,0.3,3", *served),
            ),
            700,
            lambda _: rows.decode(),
        ),
        (
            "pool",
            run.serving(
                *("tiny", "throughput", "--requests", "4", "--pool-requests", "1.5"),
                *("--settings", "0.5", "--together", *served),
            ),
            700,
            lambda _: rows.pool(),
        ),
        (
            "graphs",
            run.tests("tests/standin/test_graphs.py", "--collect-only"),
            240,
            headlines.tests,
        ),
    ]
    return [Step(*parts, shared) for parts in listed]


@dataclass(frozen=True)
class Commands:
    """Command lines, none of which needs the clone as its working directory."""

    paths: Paths

    def bundled_checks(self) -> list[str]:
        """Return a check of vLLM's compiled kernels, if the bundle has one."""
        script = self.paths.bundle and self.paths.bundle / "gpu_checks.py"
        return [self.paths.python, str(script)] if script and script.exists() else []

    def script(self, name: str, *options: str) -> list[str]:
        """Return a benchmark's command line."""
        return [self.paths.python, str(BENCHMARKS / name), *options]

    def smoke(self, *options: str) -> list[str]:
        """Return the command line of a first few answers."""
        return [self.paths.python, str(ROOT / "tests" / "gpu_smoke.py"), *options]

    def tests(self, folder: str, *options: str) -> list[str]:
        """Return pytest's command line."""
        pytest = [self.paths.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        return [*pytest, *config, str(ROOT / folder), *options]

    def kernels(self, name: str, *options: str) -> list[str]:
        """Return a kernel benchmark's command line, with fewer rounds than its own."""
        results = ("--results", str(self.paths.results), "--rounds", "20")
        return self.script(f"kernels/{name}.py", *results, *options)

    def attention(
        self, shape: str, batches: Sequence[str], splits: Sequence[str]
    ) -> list[str]:
        """Return the attention benchmark's; splits about the back end's own number."""
        sizes = ("--shapes", shape, "--batches", *batches, "--splits", *splits)
        return self.kernels("attention", *sizes)

    def serving(self, model: str, measure: str, *options: str) -> list[str]:
        """Return the serving benchmark's command line: one turn, one measurement."""
        run = self.paths.run
        folders: Sequence[str] = (
            *("--results", str(self.paths.results)),
            *("--checkpoints", str(run / "checkpoints")),
            *("--logs", str(run / f"serving-{measure}")),
        )
        turn = ("--repeats", "1", "--warm-up", "request", "--scrape-seconds", "0.2")
        asked = ("--model", model, "--measure", measure)
        return self.script("serving.py", *asked, *folders, *turn, *options)
