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

from tqdm import tqdm

from benchmarks import arguments, checkpoints
from benchmarks.engines import (
    Engine,
    Request,
    Run,
    check_identity,
    requests,
    rotated,
    shortened,
    store,
)
from benchmarks.report import append_rows, machine, print_heading, print_table, spread
from benchmarks.testing.models import ModelSize

AVL, SAME, SHIPPED = "avl", "stock, same block size", "stock, shipped"
Runs = dict[tuple[str, int], list[Run]]


@dataclass
class Compactions:
    """Time inside the scoring and compaction of adaptive layers."""

    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and append to the CSV."""
    args = parse(argv)
    model = checkpoints.build(args.checkpoints, arguments.model_size(args))
    workload = requests(
        max(args.concurrent), args.images, args.output_tokens, args.seed
    )
    engines = start(model, workload, args)
    sample = shortened(workload[:2], 8)
    engines[SHIPPED].run(sample)
    check_identity(engines[SAME], engines[AVL], sample)
    runs, shares = measure(engines, workload, args)
    settings = {
        "model": model.describe(),
        "store_ratio": args.store_ratio,
        "prompt_tokens": workload[0].prompt_tokens,
        "output_tokens": args.output_tokens,
        "repeats": args.repeats,
    }
    rows = summarize(engines, runs, args.concurrent)
    facts, share = machine(), spread("compaction_percent_of_prefill", shares)
    if not args.quick:
        append_rows(
            args.results / "overhead.csv",
            [{**facts, **settings, **row, **share} for row in rows],
        )
    print_heading("Cost over stock, memory not short", {**facts, **settings})
    print_table(rows)
    print_table([share])
    for engine in engines.values():
        engine.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.make_parser(__doc__, ModelSize())
    parser.set_defaults(repeats=7)
    add = parser.add_argument
    add("--store-ratio", type=float, default=0.5, help="S")
    add("--concurrent", type=int, nargs="+", default=[1, 8], help="requests at once")
    add("--images", type=int, default=4, help="images a prompt, 576 tokens each")
    add("--output-tokens", type=int, default=256, help="of each request")
    add("--block-size", type=int, default=32, help="of both sides in the first rows")
    args = parser.parse_args(argv)
    if args.quick:
        args.concurrent, args.output_tokens, args.repeats = [1, 2], 16, 1
    return args


def start(
    model: checkpoints.Model, workload: Sequence[Request], args: argparse.Namespace
) -> dict[str, Engine]:
    """Start the three engines, each with twice the pool that the requests need."""
    longest = workload[0].num_tokens + args.block_size
    block_sizes = {AVL: args.block_size, SAME: args.block_size, SHIPPED: None}
    return {
        name: Engine(
            model,
            settings={} if name == AVL else None,
            pool_bytes=2 * len(workload) * longest * model.bytes_per_token,
            block_size=block_size,
            max_num_seqs=len(workload),
            max_model_len=longest,
            threads=args.threads,
        )
        for name, block_size in block_sizes.items()
    }


def measure(
    engines: dict[str, Engine], workload: Sequence[Request], args: argparse.Namespace
) -> tuple[Runs, list[float]]:
    """Run every engine at every concurrency, taking turns.

    Returns:
        the runs by engine and concurrency, and what scoring and compaction take of the
        prompt's steps, in percent, for each adaptive run.
    """
    runs: Runs = {(name, n): [] for name in engines for n in args.concurrent}
    shares = []
    with tqdm(total=len(runs) * args.repeats, unit="run", disable=None) as progress:
        for repeat in range(args.repeats):
            for name, count in rotated(list(runs), repeat):
                ratio = args.store_ratio if name == AVL else None
                with timed_compactions() as compactions:
                    run = engines[name].run(workload[:count], store(ratio))
                if name == AVL:
                    shares.append(100 * compactions.seconds / run.prompt_seconds)
                runs[name, count].append(run)
                progress.update()
    return runs, shares


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
            pairs = list(zip(ours, theirs, strict=True))
            rows.append(
                {
                    "baseline": baseline,
                    "avl_block": engines[AVL].block_size,
                    "stock_block": engines[baseline].block_size,
                    "concurrent": count,
                    **spread("avl_s", [run.seconds for run in ours]),
                    **spread("stock_s", [run.seconds for run in theirs]),
                    **spread("ratio", [a.seconds / b.seconds for a, b in pairs]),
                    **spread(
                        "cpu_ratio", [a.cpu_seconds / b.cpu_seconds for a, b in pairs]
                    ),
                }
            )
    return rows


if __name__ == "__main__":
    main()
