"""What scoring and compaction need beside the cache: never over a layer's kept rows.

PyTorch's profiler reports every allocation, so the peaks are exact, not sampled. Two
of them are printed: the highest point inside one layer's work, over what was held
when it began, and the highest point of the whole prompt against stock's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from vllm_avl.kernels.cpu import threads

from benchmarks import checkpoints
from benchmarks.engines import (
    STOCK_AND_AVL,
    Engine,
    Request,
    requests,
    started,
    store,
)
from benchmarks.harness import Benchmark, Report, main, model_size
from benchmarks.testing.models import ModelSize


def measure(args: argparse.Namespace, report: Report) -> None:
    """Compare both peaks with a layer's kept rows; exit code 1 where it is too much."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    (request,) = requests(1, args.images, output_tokens=2, seed=args.seed)
    longest = request.num_tokens + args.block_size
    sizes = {
        "pool_bytes": 2 * longest * model.bytes_per_token,
        "block_size": args.block_size,
        "max_num_seqs": 1,
        "max_model_len": longest,
        # The prompt is computed in one step.
        "max_num_batched_tokens": longest,
        "threads": args.threads,
    }
    with started(model, STOCK_AND_AVL, **sizes) as engines:
        stock, avl = engines.values()
        warm_up = [replace(request, images=request.images[::-1])]
        stock.run(warm_up)
        avl.run(warm_up, store(min(args.store_ratio)))
        stock_peak = peak_bytes(lambda: stock.run([request]))
        rows = [
            measure_one(model, avl, request, ratio, stock_peak)
            for ratio in tqdm(args.store_ratio, unit="run", disable=None)
        ]
    settings = {
        "model": model.describe(),
        "block_size": args.block_size,
        "prompt_tokens": request.prompt_tokens,
    }
    report.add("memory", "Memory beside the cache, in bytes", settings, rows)
    if not all(row["transient_fits"] and row["rise_fits"] for row in rows):
        sys.exit("compaction took more than one layer's kept rows")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.set_defaults(dtype="float32")
    add = parser.add_argument
    add("--store-ratio", type=float, nargs="+", default=[0.5, 0.2], help="values of S")
    add("--images", type=int, default=4, help="images of the prompt, 576 tokens each")
    add("--block-size", type=int, default=32, help="of both sides")


def measure_one(
    model: checkpoints.Model,
    avl: Engine,
    request: Request,
    store_ratio: float,
    stock_peak: int,
) -> dict[str, object]:
    """Compare both peaks with the kept rows of one layer.

    The two peaks are taken in runs of their own: profilers do not nest.
    """
    with profiled_compactions() as calls:
        avl.run([request], store(store_ratio))
    prompt_peak = peak_bytes(lambda: avl.run([request], store(store_ratio)))
    transient, num_kept = max(calls)
    kept = num_kept * model.layer_bytes_per_token
    rise = prompt_peak - stock_peak
    return {
        "S": store_ratio,
        "compactions": len(calls),
        "kept_rows_of_a_layer": kept,
        "transient": transient,
        "share": transient / kept,
        "stock_peak": stock_peak,
        "avl_peak": prompt_peak,
        "rise": rise,
        "transient_fits": transient <= kept,
        "rise_fits": rise <= kept,
    }


@contextmanager
def profiled_compactions() -> Iterator[list[tuple[int, int]]]:
    """Collect transient bytes and kept rows of every layer's compaction."""
    from vllm_avl.worker.layer import Layer

    calls: list[tuple[int, int]] = []
    perform = Layer.perform

    def profiled(layer: Layer, task: Any, *args: Any) -> None:
        plan = task.state.plan
        # Else only the first layer would be seen to need it.
        threads.drop_scratch()
        transient = peak_bytes(lambda: perform(layer, task, *args))
        calls.append((transient, plan.num_stored_blocks * plan.block_size))

    with patch.object(Layer, "perform", profiled):
        yield calls


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes of tensors `work` holds over what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


QUICK = {"images": 2}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, size=ModelSize())

if __name__ == "__main__":
    main(BENCHMARK)
