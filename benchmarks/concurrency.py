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
from dataclasses import replace

from benchmarks import checkpoints
from benchmarks.engines import (
    STOCK,
    STOCK_AND_AVL,
    Request,
    check_identity,
    requests,
    shortened,
    started,
    store,
)
from benchmarks.gate import check_loops
from benchmarks.harness import Benchmark, Report, main, model_size, take_turns
from benchmarks.plots import draw_concurrency
from benchmarks.runs import Run, counts, gains, median, tokens_per_second
from benchmarks.testing.models import ModelSize

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


def measure(args: argparse.Namespace, report: Report) -> None:
    """Run every variant in the same pool, and compare with stock's of its turn."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    workload = make_workload(args)
    longest = max(request.num_tokens for request in workload)
    blocks = -(-longest // args.block_size)
    block_bytes = args.block_size * model.bytes_per_token
    sizes = {
        "pool_bytes": int(args.pool_requests * blocks) * block_bytes,
        "block_size": args.block_size,
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": blocks * args.block_size,
        "threads": args.threads,
    }
    stored = {f"S={ratio:g}": ratio for ratio in args.store_ratio}
    with started(model, STOCK_AND_AVL, **sizes) as engines:
        stock, avl = engines.values()
        check_identity(stock, avl, shortened(workload[:3], 16))
        for ratio in stored.values():
            check_loops(avl, shortened(workload[:2], 4), store(ratio))
        settings = {
            "model": model.describe(),
            "block_size": args.block_size,
            "pool_tokens": stock.pool_tokens,
            "requests": len(workload),
            "prompt_tokens": workload[0].prompt_tokens,
            "output_tokens": args.output_tokens,
        }

        def run(name: str, repeat: int) -> Run:
            engine = stock if name == STOCK else avl
            return engine.run(workload, store(stored.get(name)))

        runs = take_turns([STOCK, *stored], args.repeats, run)
    rows = [
        {
            "variant": name,
            **counts(of_one),
            "prompt_share": median(of_one, lambda run: run.prompt_share),
            **tokens_per_second(of_one),
            **gains(of_one, runs[STOCK]),
        }
        for name, of_one in runs.items()
    ]
    title = "Requests served at once from one KV pool"
    report.add("concurrency", title, settings, rows, hidden="_ratio_p")
    firsts = {name: of_one[0] for name, of_one in runs.items()}
    report.draw("concurrency", draw_concurrency, firsts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--store-ratio", type=float, nargs="+", default=[0.5, 0.2], help="values of S")
    add("--requests", type=int, default=48, help="requests that wait at the start")
    add("--images", type=int, default=4, help="images a prompt, 576 tokens each")
    add("--output-tokens", type=int, default=768, help="mean of a request's output")
    add("--pool-requests", type=float, default=6.5, help="stock requests that fit")
    add("--block-size", type=int, default=32, help="of both sides")
    add("--max-num-seqs", type=int, default=20, help="vLLM's cap, of both sides")


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


QUICK = {"requests": 10, "output_tokens": 32, "repeats": 1, "pool_requests": 3.5}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, size=SIZE)

if __name__ == "__main__":
    main(BENCHMARK)
