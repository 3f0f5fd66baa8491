"""The server that is soaked: its model, its options, and what it holds."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from benchmarks.testing import models
from vllm_avl.demo.server import (
    ONE_THREAD,
    Server,
    ServerError,
    json_option,
    picture_url,
    serve,
    user_message,
)

SIZE = models.ModelSize(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=32,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_num_layers=1,
    vision_intermediate_size=64,
)
BLOCK_SIZE = 32
NUM_BLOCKS = 128
"""Of the pool: two requests of the longest kind, as stock stores them."""
MAX_IMAGES = 3
MAX_MODEL_LEN = 2400
MAX_PIXELS = 50_000_000
AVL = ("--attention-backend", "avl")
SMALL = (
    *AVL,
    # The encoder cache holds as many tokens: one picture of 576 at a time.
    *("--max-num-batched-tokens", "600"),
    # On, with room for all pictures: its halves must stay alike.
    *("--mm-processor-cache-gb", "2"),
)
DRAIN_SECONDS = 120
XARGS: Sequence[Mapping[str, Any]] = (
    {},
    {"avl": 0},
    {"avl_store_ratio": 0.2},
    {"avl_core_ratio": 0.2, "avl_refresh_interval": 3},
    {"avl_store_ratio": 0.3, "avl_core_ratio": 0.1, "avl_refresh_interval": 8},
    {"avl_core_ratio": 0.2, "avl_text_keep_ratio": 0.4},
    {"avl_policy": "snapkv", "avl_store_ratio": 0.3},
)
"""What the requests of load, aborts and bursts are served with."""


def checkpoint(folder: Path) -> Path:
    """Write the random-weight model."""
    return models.build("llava", folder / "soak-llava", SIZE)


def start(
    model: Path,
    log: Path,
    timeout: float,
    options: Sequence[str] = AVL,
    environment: Mapping[str, str] = ONE_THREAD,
) -> AbstractContextManager[Server]:
    """Start a server; all of a run differ in `options` alone."""
    token_bytes = 2 * SIZE.num_layers * SIZE.num_kv_heads * SIZE.head_size * 4
    common = [
        *("--dtype", "float32", "--enforce-eager"),
        *("--block-size", str(BLOCK_SIZE)),
        # The null block is one more.
        *("--kv-cache-memory-bytes", str((NUM_BLOCKS + 1) * BLOCK_SIZE * token_bytes)),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16"),
        *("--max-num-batched-tokens", "1024", "--scheduling-policy", "priority"),
        # Once full, vLLM's answers 500 to a picture that a refused request had
        # (both halves forget by their own order), and until then it looks like a leak.
        *("--mm-processor-cache-gb", "0"),
        *json_option("--limit-mm-per-prompt", {"image": MAX_IMAGES}),
    ]
    limits = {
        "VLLM_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
        "VLLM_PLUGINS": "avl",
        # Where a server closes idle connections, its end of one and a client's next
        # request may cross, and the client has an error that is nobody's.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    }
    return serve(
        model,
        [*common, *options],
        log=log,
        timeout=timeout,
        environment={**environment, **limits},
        report=tqdm.write,
    )


def body(
    server: Server, pictures: Sequence[int], text: str = "What is it?", **changes: Any
) -> dict[str, Any]:
    """Return a greedy chat request about random pictures, named by their seeds."""
    urls = [picture_url(models.random_image(seed)) for seed in pictures]
    settings = {
        "model": server.model,
        "messages": [user_message(text, urls)],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
    }
    return settings | changes


def random_body(server: Server, rng: random.Random, **changes: Any) -> dict[str, Any]:
    """Return a request of random pictures, text length and settings."""
    pictures = [rng.randrange(10**6) for _ in range(rng.randint(0, MAX_IMAGES))]
    text = "Tell me. " * rng.randint(1, 20)
    return body(server, pictures, text, vllm_xargs=rng.choice(XARGS), **changes)


def processes(server: Server) -> list[psutil.Process]:
    """Return the server's process and all that it started, orphans too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == server.process.pid:
                found.append(process)
    return found


def resident_mb(server: Server) -> float:
    """Return the memory that the server's processes hold, MiB."""
    total = 0
    for process in processes(server):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def named(server: Server, name: str) -> psutil.Process:
    """Return the first of the server's processes whose title begins with `name`."""
    for process in processes(server):
        with suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith(name):
                return process
    raise LookupError(f"{server.log}: no process {name!r}")


@contextmanager
def told_if_it_ends(server: Server) -> Iterator[None]:
    """Say how the server ended where a request failed because of that."""
    try:
        yield
    except httpx.TransportError as error:
        code = server.process.poll()
        raise ServerError(f"{error}; exit status of the server: {code}") from error


def drained(server: Server) -> tuple[int, float]:
    """Wait until nothing runs or waits; return blocks held and requests left.

    The blocks are read until they are none, or for `DRAIN_SECONDS`.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        metrics = server.metrics()
        left = metrics.total("vllm:num_requests_running")
        left += metrics.total("vllm:num_requests_waiting")
        held = metrics.held_blocks
        if held == left == 0 or time.monotonic() > deadline:
            return held, left
        time.sleep(0.5)
