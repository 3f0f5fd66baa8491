"""Fixtures of all tests: offline, in-process engines over small random models."""

import os

# Before vLLM is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
# Small models gain nothing from threads, and busy waiting starves parallel workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# An n-gram drafter would give every later engine of the process as many as Numba has.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import garbage
import pytest

from benchmarks.testing import models
from benchmarks.testing.engine import Engine

TESTS = Path(__file__).parent
LONGEST = (
    *("engine/test_families.py", "standin/test_graphs.py", "standin/test_eager.py"),
    *("standin/test_standin.py", "engine/test_requests.py", "engine/test_oracle.py"),
    *("engine/test_integrity.py", "engine/test_drafts.py", "worker/test_layer.py"),
    *("engine/test_drafted_core.py", "standin/test_fp8_cache.py"),
    *("standin/test_drafter.py", "standin/test_both_directions.py"),
    *("standin/test_recurrent.py", "standin/test_drafted_core.py"),
    *("standin/test_families_on_cuda.py", "engine/test_nixl.py"),
    *("bundled/test_weights.py", "soak/test_soak.py", "bench/test_quick.py"),
    *("bundled/test_small.py", "e2e/test_demo.py", "e2e/test_endpoints.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: in the end, one worker would be left with it."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Keep what is imported out of every later garbage collection."""
    gc.collect()
    garbage.keep_modules_out()


def pytest_unconfigure() -> None:
    """Let the interpreter end as it does."""
    garbage.unfreeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small random-weight checkpoints by architecture name, built once a session."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(name: str) -> Path:
        return models.build(name, root / name)

    return build


@pytest.fixture(scope="module")
def engines(checkpoints) -> Iterator[Callable[..., Engine]]:
    """Engines that live as long as the module; equal options give the same engine."""
    started: dict[tuple, Engine] = {}

    def start(name: str = "llava", **options) -> Engine:
        key = (name, repr(sorted(options.items(), key=lambda item: item[0])))
        if key not in started:
            started[key] = Engine(checkpoints(name), name, **options)
        return started[key]

    yield start
    for engine in started.values():
        engine.shutdown()
