"""What a decode step costs, stock and adaptive, and how near attention is to memory.

The model has the attention of LLaVA-1.5-7B (32 heads of 128) in a few layers, narrow
otherwise, so that attention is what a step does. All prompts are computed in one step:
the requests refresh together, which is the worst case for a single step. Times of the
attention layers are compared with the bytes they must read over the bandwidth of a
memory copy in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.decode_watch import Steps, median, watched
from benchmarks.engines import (
    STOCK,
    STOCK_AND_AVL,
    Request,
    check_identity,
    requests,
    shortened,
    started,
)
from benchmarks.gate import check_loops
from benchmarks.harness import Benchmark, Report, main, model_size, take_turns
from benchmarks.plots import draw_decode
from benchmarks.report import ratios, spread
from benchmarks.testing.models import ModelSize

SIZE = ModelSize(
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=64,
)


@dataclass(frozen=True)
class Variant:
    """Settings of all requests of a run; None for stock."""

    store: float
    core: float
    interval: int

    @property
    def name(self) -> str:
        """Short name in the paper's symbols."""
        return f"S={self.store:g} C={self.core:g} K={self.interval}"

    @property
    def xargs(self) -> dict[str, float]:
        """The request's arguments."""
        return {
            "avl_store_ratio": self.store,
            "avl_core_ratio": self.core,
            "avl_refresh_interval": self.interval,
        }


SAME = Variant(1, 1, 0)
VARIANTS = (
    Variant(0.5, 0.3, 3),
    Variant(0.5, 0.5, 0),
    Variant(0.3, 0.1, 8),
    Variant(0.3, 0.3, 0),
)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Measure with each number of images, and draw the times over the lengths."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    times: dict[str, list[tuple[int, float]]] = {}
    for num_images in args.images:
        workload = requests(args.requests, num_images, args.output_tokens, args.seed)
        bandwidth = copy_bandwidth(args.threads)
        rows = summarize(run_all(model, workload, args), model, bandwidth)
        settings = {
            "model": model.describe(),
            "block_size": args.block_size,
            "requests": len(workload),
            "prompt_tokens": workload[0].prompt_tokens,
            "output_tokens": args.output_tokens,
            "repeats": args.repeats,
            "copy_gb_per_s": bandwidth / 1e9,
        }
        # Percentiles of all but the step's ratio are in the CSV alone.
        hidden = "^(mean|refresh)_ratio_p"
        report.add("decode", "Decode steps", settings, rows, hidden)
        for row in rows:
            point = workload[0].prompt_tokens, row["step_ms"]
            times.setdefault(row["variant"], []).append(point)
    report.draw("decode", draw_decode, times)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.set_defaults(threads=2)
    add = parser.add_argument
    add("--requests", type=int, default=8, help="requests in the batch")
    add(
        "--images",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="images a prompt, 576 tokens each; one table for each number",
    )
    add("--output-tokens", type=int, default=128, help="of each request")
    add("--block-size", type=int, default=32, help="of both sides")


def run_all(
    model: checkpoints.Model, workload: Sequence[Request], args: argparse.Namespace
) -> dict[str, list[Steps]]:
    """Run stock and every variant, taking turns."""
    total = sum(request.num_tokens + args.block_size for request in workload)
    sizes = {
        "pool_bytes": (total + args.block_size) * model.bytes_per_token,
        "block_size": args.block_size,
        "max_num_seqs": len(workload),
        "max_model_len": workload[0].num_tokens + args.block_size,
        "max_num_batched_tokens": total,
        "threads": args.threads,
    }
    variants = {variant.name: variant.xargs for variant in VARIANTS}
    with started(model, STOCK_AND_AVL, **sizes) as engines:
        stock, avl = engines.values()
        check_identity(stock, avl, shortened(workload, 8), SAME.xargs)
        for xargs in variants.values():
            check_loops(avl, shortened(workload[:2], 12), xargs)

        def run(name: str, repeat: int) -> Steps:
            engine = stock if name == STOCK else avl
            with watched() as steps:
                steps.run = engine.run(workload, variants.get(name))
            return steps

        return take_turns([STOCK, *variants], args.repeats, run)


def copy_bandwidth(threads: int) -> float:
    """Bytes per second, read and written, of a large copy with as many threads."""
    torch.set_num_threads(threads)
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def summarize(
    measured: Mapping[str, list[Steps]], model: checkpoints.Model, bandwidth: float
) -> list[dict[str, Any]]:
    """Return one row a variant; ratios are to stock's run of the same turn."""
    rows = []
    layers = model.size.num_layers
    for name, turns in measured.items():
        stock = measured[STOCK]
        pairs = list(zip(turns, stock, strict=True))
        refreshes = [
            median(a.seconds(True)) / median(b.seconds())
            for a, b in pairs
            if a.seconds(True)
        ]
        attention = median([median(a.attention(False)) for a in turns])
        read = median([median(a.rows(False)) for a in turns])
        bound = read * model.layer_bytes_per_token * layers / bandwidth
        rows.append(
            {
                "variant": name,
                "step_ms": 1e3 * median([median(a.seconds()) for a in turns]),
                **ratios("ratio", turns, stock, lambda run: median(run.seconds())),
                **ratios("mean_ratio", turns, stock, lambda run: fmean(run.seconds())),
                **spread("refresh_ratio", refreshes or [float("nan")]),
                "rows_read": read,
                "attention_ms": 1e3 * attention,
                "bound_ms": 1e3 * bound,
                "attention_over_bound": attention / bound,
                "end_to_end_ratio": median(
                    [a.run.seconds / b.run.seconds for a, b in pairs]
                ),
                "choose_request_layer_ms": 1e3
                * median([median(a.choosing) for a in turns if a.choosing] or [0.0]),
            }
        )
    return rows


QUICK = {"requests": 2, "images": [1], "output_tokens": 20, "repeats": 1}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, size=SIZE)

if __name__ == "__main__":
    main(BENCHMARK)
