"""How long `vllm serve` takes until it answers: stock, `avl`, and `avl`'s first start.

Each server is a fresh process, as a user starts it, and they take turns. `stock` loads
no plug-in. A first start compiles our loops; later ones find them on disk. `ready` is
until /health answers, `answered` until the first answer about a picture is there.
Differences are to stock of the same repeat.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.harness import CHECKPOINTS, Benchmark, Report, main, take_turns
from benchmarks.report import spread
from vllm_avl.bundled import WEIGHTS
from vllm_avl.bundled.samples import DESCRIBE, make_sample
from vllm_avl.demo.__main__ import DEMO_MODEL_OPTIONS
from vllm_avl.demo.server import ONE_THREAD, picture_url, serve, user_message

STOCK, AVL, FIRST = "stock", "avl", "avl, first start"
OPTIONS = {STOCK: (), AVL: ("--attention-backend", "avl")}


@dataclass(frozen=True)
class Start:
    """Seconds from the command to what a user sees."""

    ready: float
    answered: float


def measure(args: argparse.Namespace, report: Report) -> None:
    """Start servers in turn."""
    variants = [STOCK, AVL] if args.quick else [STOCK, AVL, FIRST]
    if not args.quick:
        # Weights into the page cache, loops onto the disk: no start pays for another.
        for variant in (STOCK, AVL):
            start(variant, args.dtype, args.logs)
    found = take_turns(
        variants, args.repeats, lambda name, repeat: start(name, args.dtype, args.logs)
    )
    settings = {"model": WEIGHTS.name, "dtype": args.dtype, "repeats": args.repeats}
    report.add("startup", "Start-up, in seconds", settings, summarize(found))


def start(variant: str, dtype: str, logs: Path) -> Start:
    """Start a server, ask it once, and stop it."""
    plugins = "" if variant == STOCK else "avl"
    environment = {**ONE_THREAD, "VLLM_PLUGINS": plugins}
    with ExitStack() as stack:
        if variant == FIRST:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            environment["NUMBA_CACHE_DIR"] = folder
        options = [*DEMO_MODEL_OPTIONS, "--dtype", dtype]
        options += OPTIONS[STOCK if variant == STOCK else AVL]
        begin = time.perf_counter()
        server = stack.enter_context(
            serve(
                WEIGHTS,
                options,
                log=logs / f"{variant.replace(', ', '-').replace(' ', '-')}.log",
                environment=environment,
                report=tqdm.write,
            )
        )
        ready = time.perf_counter() - begin
        pictures = make_sample("caption", "test", 0).images()
        server.client().chat.completions.create(
            model=server.model,
            messages=[user_message(DESCRIBE, [picture_url(p) for p in pictures])],
            max_tokens=8,
            temperature=0,
        )
        return Start(ready, time.perf_counter() - begin)


def summarize(found: Mapping[str, Sequence[Start]]) -> list[dict[str, object]]:
    """Return a row a variant."""
    rows = []
    for variant, starts in found.items():
        row: dict[str, object] = {"variant": variant}
        for column in ("ready", "answered"):
            ours = [getattr(one, column) for one in starts]
            stock = [getattr(one, column) for one in found[STOCK]]
            over = [a - b for a, b in zip(ours, stock, strict=True)]
            row |= spread(f"{column}_s", ours) | spread(f"{column}_over", over)
        rows.append(row)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="starts of each variant")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--logs", type=Path, default=CHECKPOINTS / "startup-logs", help="folder, kept")


BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": {"repeats": 1}})

if __name__ == "__main__":
    main(BENCHMARK)
