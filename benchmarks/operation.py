"""What it costs to operate: `engage: pressure` with a loose and a tight pool, metrics.

Every case compares variants with a baseline in the same run, a step of each engine in
turn. With a loose pool `engage: pressure` adapts nobody and is compared with stock;
with a tight one it is compared with `engage: always`. An engine whose metrics and
introspection are on is compared with one that counts nothing for anybody.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks import checkpoints
from benchmarks.engines import requests, run_together, shortened, started
from benchmarks.gate import check_loops
from benchmarks.harness import Benchmark, Report, main, model_size
from benchmarks.runs import Run, gains, tokens_per_second
from benchmarks.testing.models import ModelSize

PRESSURE = {"engage": "pressure"}
CORE = {"core_ratio": 0.3}
SIZE = ModelSize(
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=64,
)
ALWAYS = ("always", "unobserved")
"""Variants that adapt whatever the pool."""


@dataclass(frozen=True)
class Case:
    """Variants that serve the same requests; the first is the baseline."""

    name: str
    variants: Mapping[str, Mapping[str, Any]]
    """Options of their engines."""
    tight: bool


CASES = (
    Case(
        "loose pool",
        {"stock": {"settings": None}, "pressure": {"settings": PRESSURE}},
        tight=False,
    ),
    Case(
        "tight pool",
        {
            "always": {"settings": {}},
            "pressure": {"settings": PRESSURE},
            "stock": {"settings": None},
        },
        tight=True,
    ),
    Case(
        "observed",
        {
            "unobserved": {"settings": CORE},
            "metrics": {"settings": CORE, "collects_stats": True},
            "metrics and introspection": {
                "settings": CORE | {"introspection": 16},
                "collects_stats": True,
            },
        },
        tight=False,
    ),
)
Runs = dict[str, list[Run]]


def measure(args: argparse.Namespace, report: Report) -> None:
    """Let every case's engines serve the same requests, a step of each in turn."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    workload = requests(args.requests, args.images, args.output_tokens, args.seed)
    longest = workload[0].num_tokens + args.block_size
    sizes = {
        "block_size": args.block_size,
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": longest,
        "threads": args.threads,
    }
    cases = [case for case in CASES if args.case in (None, case.name)]
    rows = []
    for case in cases:
        fitting = args.pool_requests if case.tight else 2 * args.max_num_seqs
        sizes["pool_bytes"] = int(fitting * longest) * model.bytes_per_token
        with started(model, case.variants, **sizes) as engines:
            for name, engine in engines.items():
                if name in ALWAYS:
                    check_loops(engine, shortened(workload[:2], 8))
            runs: Runs = {name: [] for name in engines}
            for _ in tqdm(range(args.repeats), case.name, unit="repeat", disable=None):
                for name, run in run_together(engines, workload).items():
                    runs[name].append(run)
        rows += summarize(case, runs)
    settings = {
        "model": model.describe(),
        "requests": len(workload),
        "prompt_tokens": workload[0].prompt_tokens,
        "output_tokens": args.output_tokens,
        "pool_requests": args.pool_requests,
        "repeats": args.repeats,
    }
    report.add("operation", "What operating costs", settings, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.set_defaults(repeats=5)
    add = parser.add_argument
    add("--requests", type=int, default=24, help="requests that wait at the start")
    add("--images", type=int, default=2, help="images a prompt, 576 tokens each")
    add("--output-tokens", type=int, default=128, help="of each request")
    add("--pool-requests", type=float, default=4.5, help="that fit the tight pool")
    add("--block-size", type=int, default=32, help="of all engines")
    add("--max-num-seqs", type=int, default=8, help="vLLM's cap")
    add("--case", choices=[case.name for case in CASES], help="measure this one only")


def summarize(case: Case, of_variant: Runs) -> list[dict[str, object]]:
    """Return a row a variant: its speed over the baseline's of the same turn."""
    baseline = next(iter(of_variant))
    return [
        {
            "case": case.name,
            "variant": name,
            "adapted": len(runs[-1].adapted),
            "peak_running": max(max(run.running) for run in runs),
            "preemptions": runs[-1].preemptions,
            **tokens_per_second(runs),
            "baseline": baseline,
            **gains(runs, of_variant[baseline]),
        }
        for name, runs in of_variant.items()
    ]


QUICK = {"requests": 6, "output_tokens": 16, "repeats": 1, "pool_requests": 2.5}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, size=SIZE)

if __name__ == "__main__":
    main(BENCHMARK)
