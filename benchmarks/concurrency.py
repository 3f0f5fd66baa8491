"""How many requests one fixed KV pool serves at once, stock and adaptive.

All requests wait from the start. Running requests (those that generate in a step),
preemptions and steps are exact counts; tokens per second cover the engine's steps,
prompts included. The model is small on purpose: a larger batch pays where a step has a
cost that the batch shares. On a GPU that is reading the weights; a CPU computes too
slowly for that, and the shared cost here is vLLM's own per step. The rest of the gain
is attention that reads fewer rows: the model has a KV head for each query head, as
LLaVA-1.5 has.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from benchmarks import arguments, checkpoints
from benchmarks.engines import (
    Engine,
    Request,
    Run,
    check_identity,
    requests,
    shortened,
    store,
)
from benchmarks.plots import draw_concurrency
from benchmarks.report import append_rows, machine, print_heading, print_table, spread
from benchmarks.testing.models import ModelSize

STOCK = "stock"
SIZE = ModelSize(
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=64,
)
Runs = dict[str, list[Run]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, append to the CSV and draw the plot."""
    args = parse(argv)
    model = checkpoints.build(args.checkpoints, arguments.model_size(args))
    workload = make_workload(args)
    longest = max(request.num_tokens for request in workload)
    blocks = -(-longest // args.block_size)
    block_bytes = args.block_size * model.bytes_per_token
    stock, avl = (
        Engine(
            model,
            settings={} if is_avl else None,
            pool_bytes=int(args.pool_requests * blocks) * block_bytes,
            block_size=args.block_size,
            max_num_seqs=args.max_num_seqs,
            max_model_len=blocks * args.block_size,
            threads=args.threads,
        )
        for is_avl in (False, True)
    )
    check_identity(stock, avl, shortened(workload[:3], 16))
    runs = measure(stock, avl, workload, args)
    settings = {
        "model": model.describe(),
        "block_size": args.block_size,
        "pool_tokens": stock.pool_tokens,
        "requests": len(workload),
        "prompt_tokens": workload[0].prompt_tokens,
        "output_tokens": args.output_tokens,
    }
    rows = summarize(runs)
    facts = machine()
    if not args.quick:
        append_rows(
            args.results / "concurrency.csv",
            [{**facts, **settings, **row} for row in rows],
        )
    draw_concurrency(
        {name: of_one[0] for name, of_one in runs.items()},
        args.results / f"concurrency{'-quick' if args.quick else ''}.png",
    )
    print_heading("Requests served at once from one KV pool", {**facts, **settings})
    print_table([shorten(row) for row in rows])
    stock.close()
    avl.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.make_parser(__doc__, SIZE)
    add = parser.add_argument
    add("--store-ratio", type=float, nargs="+", default=[0.5, 0.2], help="values of S")
    add("--requests", type=int, default=48, help="requests that wait at the start")
    add("--images", type=int, default=4, help="images a prompt, 576 tokens each")
    add("--output-tokens", type=int, default=768, help="mean of a request's output")
    add("--pool-requests", type=float, default=6.5, help="stock requests that fit")
    add("--block-size", type=int, default=32, help="of both sides")
    add("--max-num-seqs", type=int, default=20, help="vLLM's cap, of both sides")
    args = parser.parse_args(argv)
    if args.quick:
        args.requests, args.output_tokens, args.repeats = 10, 32, 1
        args.pool_requests = 3.5
    return args


def make_workload(args: argparse.Namespace) -> list[Request]:
    """Make prompts of one length whose outputs end at different times."""
    workload = requests(args.requests, args.images, args.output_tokens, args.seed)
    spreads = (0.75, 1.25, 1.0, 0.875, 1.125)
    return [
        replace(
            request,
            output_tokens=int(args.output_tokens * spreads[index % len(spreads)]),
        )
        for index, request in enumerate(workload)
    ]


def measure(
    stock: Engine, avl: Engine, workload: Sequence[Request], args: argparse.Namespace
) -> Runs:
    """Run every variant `args.repeats` times, taking turns."""
    ratios = {STOCK: None} | {f"S={ratio:g}": ratio for ratio in args.store_ratio}
    runs: Runs = {name: [] for name in ratios}
    tokens = sum(request.output_tokens for request in workload)
    total = tokens * len(ratios) * args.repeats
    with tqdm(total=total, unit="token", disable=None) as progress:
        for _ in range(args.repeats):
            for name, ratio in ratios.items():
                progress.set_description(name)
                engine = stock if ratio is None else avl
                runs[name].append(engine.run(workload, store(ratio), progress.update))
    return runs


def summarize(runs: Runs) -> list[dict[str, object]]:
    """Return one row a variant: counts, and rates relative to stock's of its turn."""
    rows = []
    for name, of_one in runs.items():
        pairs = list(zip(of_one, runs[STOCK], strict=True))
        rows.append(
            {
                "variant": name,
                "peak_running": max(max(run.running) for run in of_one),
                "mean_running": statistics.fmean(of_one[0].running),
                "preemptions": statistics.median(run.preemptions for run in of_one),
                "steps": statistics.median(len(run.running) for run in of_one),
                "mean_pool_use": statistics.fmean(of_one[0].pool_use),
                "prompt_share": statistics.median(
                    run.prompt_seconds / run.seconds for run in of_one
                ),
                **spread("tokens_per_s", [run.tokens_per_second for run in of_one]),
                **spread(
                    "ratio",
                    [a.tokens_per_second / b.tokens_per_second for a, b in pairs],
                ),
                **spread(
                    "cpu_ratio", [b.cpu_seconds / a.cpu_seconds for a, b in pairs]
                ),
            }
        )
    return rows


def shorten(row: dict[str, object]) -> dict[str, object]:
    """Leave the percentiles of all but the rates to the CSV."""
    return {name: value for name, value in row.items() if "_ratio_p" not in name}


if __name__ == "__main__":
    main()
