"""What eviction costs where memory is not short: stock and adaptive, a loose pool.

Each row compares the end-to-end time of the same requests. "shipped" leaves stock at
its default block size, as somebody who installs the plug-in compares it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from benchmarks import checkpoints
from benchmarks.engines import (
    AVL,
    Engine,
    Request,
    check_identity,
    requests,
    shortened,
    started,
    store,
)
from benchmarks.gate import check_loops
from benchmarks.harness import Benchmark, Report, main, model_size, take_turns
from benchmarks.report import ratios, spread
from benchmarks.runs import Run
from benchmarks.testing.models import ModelSize

SAME, SHIPPED = "stock, same block size", "stock, shipped"
Runs = dict[tuple[str, int], list[Run]]


@dataclass
class Compactions:
    """Time inside the scoring and compaction of adaptive layers."""

    seconds: float = 0.0


def measure(args: argparse.Namespace, report: Report) -> None:
    """Run the three engines at every concurrency, each with twice the pool it needs."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    count = max(args.concurrent)
    workload = requests(count, args.images, args.output_tokens, args.seed)
    longest = workload[0].num_tokens + args.block_size
    sizes = {
        "pool_bytes": 2 * len(workload) * longest * model.bytes_per_token,
        "max_num_seqs": len(workload),
        "max_model_len": longest,
        "threads": args.threads,
    }
    variants = {
        AVL: {"settings": {}, "block_size": args.block_size},
        SAME: {"settings": None, "block_size": args.block_size},
        SHIPPED: {"settings": None, "block_size": None},
    }
    with started(model, variants, **sizes) as engines:
        sample = shortened(workload[:2], 8)
        engines[SHIPPED].run(sample)
        check_identity(engines[SAME], engines[AVL], sample)
        check_loops(engines[AVL], sample, store(args.store_ratio))
        runs, shares = run_all(engines, workload, args)
        rows = summarize(engines, runs, args.concurrent)
    settings = {
        "model": model.describe(),
        "store_ratio": args.store_ratio,
        "prompt_tokens": workload[0].prompt_tokens,
        "output_tokens": args.output_tokens,
        "repeats": args.repeats,
    }
    share = spread("compaction_percent_of_prefill", shares)
    title = "Cost over stock, memory not short"
    report.add("overhead", title, settings, [row | share for row in rows])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.set_defaults(repeats=7)
    add = parser.add_argument
    add("--store-ratio", type=float, default=0.5, help="S")
    add("--concurrent", type=int, nargs="+", default=[1, 8], help="requests at once")
    add("--images", type=int, default=4, help="images a prompt, 576 tokens each")
    add("--output-tokens", type=int, default=256, help="of each request")
    add("--block-size", type=int, default=32, help="of both sides in the first rows")


def run_all(
    engines: dict[str, Engine], workload: Sequence[Request], args: argparse.Namespace
) -> tuple[Runs, list[float]]:
    """Run every engine at every concurrency, taking turns.

    Returns:
        the runs by engine and concurrency, and what scoring and compaction take of the
        prompt's steps, in percent, for each adaptive run.
    """
    shares = []

    def run(variant: tuple[str, int], repeat: int) -> Run:
        name, count = variant
        ratio = args.store_ratio if name == AVL else None
        with timed_compactions() as compactions:
            found = engines[name].run(workload[:count], store(ratio))
        if name == AVL:
            shares.append(100 * compactions.seconds / found.prompt_seconds)
        return found

    variants = [(name, count) for name in engines for count in args.concurrent]
    return take_turns(variants, args.repeats, run), shares


@contextmanager
def timed_compactions() -> Iterator[Compactions]:
    """Time what every layer does after a prompt's attention."""
    from vllm_avl.worker.layer import Layer

    compactions, perform = Compactions(), Layer.perform

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        perform(*args)
        compactions.seconds += time.perf_counter() - start

    with patch.object(Layer, "perform", timed):
        yield compactions


def summarize(
    engines: dict[str, Engine], runs: Runs, concurrent: Sequence[int]
) -> list[dict[str, object]]:
    """Return a row for every baseline and concurrency; over 1 means slower."""
    rows = []
    for baseline in (SAME, SHIPPED):
        for count in concurrent:
            ours, theirs = runs[AVL, count], runs[baseline, count]
            rows.append(
                {
                    "baseline": baseline,
                    "avl_block": engines[AVL].block_size,
                    "stock_block": engines[baseline].block_size,
                    "concurrent": count,
                    **spread("avl_s", [run.seconds for run in ours]),
                    **spread("stock_s", [run.seconds for run in theirs]),
                    **ratios("ratio", ours, theirs, lambda run: run.seconds),
                    **ratios("cpu_ratio", ours, theirs, lambda run: run.cpu_seconds),
                }
            )
    return rows


QUICK = {"concurrent": [1, 2], "output_tokens": 16, "repeats": 1}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, size=ModelSize())

if __name__ == "__main__":
    main(BENCHMARK)
