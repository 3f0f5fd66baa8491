"""Fixtures of all tests: offline, in-process engines over small random models."""

import os

# Before vLLM is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
# Small models gain nothing from threads, and busy waiting starves parallel workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import garbage
import pytest

from vllm_avl.testing import models
from vllm_avl.testing.engine import Engine


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
