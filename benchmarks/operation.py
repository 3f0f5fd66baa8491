"""What it costs to operate: `engage: pressure` with a loose and a tight pool, metrics.

Every case compares variants with a baseline in the same run, a step of each engine in
turn. With a loose pool `engage: pressure` adapts nobody and is compared with stock;
with a tight one it is compared with `engage: always`. An engine whose metrics and
introspection are on is compared with one that counts nothing for anybody.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks import arguments, checkpoints
from benchmarks.engines import Engine, Request, Run, requests, run_together
from benchmarks.report import append_rows, machine, print_heading, print_table, spread
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


@dataclass(frozen=True)
class Variant:
    """How one engine is started."""

    settings: Mapping[str, Any] | None
    """Of the plug-in; None is stock."""
    observed: bool = False
    """Whether statistics are collected, as a server does."""


@dataclass(frozen=True)
class Case:
    """Variants that serve the same requests; the first is the baseline."""

    name: str
    variants: Mapping[str, Variant]
    tight: bool


CASES = (
    Case(
        "loose pool",
        {"stock": Variant(None), "pressure": Variant(PRESSURE)},
        tight=False,
    ),
    Case(
        "tight pool",
        {
            "always": Variant({}),
            "pressure": Variant(PRESSURE),
            "stock": Variant(None),
        },
        tight=True,
    ),
    Case(
        "observed",
        {
            "unobserved": Variant(CORE),
            "metrics": Variant(CORE, observed=True),
            "metrics and introspection": Variant(
                CORE | {"introspection": 16}, observed=True
            ),
        },
        tight=False,
    ),
)


Runs = dict[str, list[Run]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and append to the CSV."""
    args = parse(argv)
    model = checkpoints.build(args.checkpoints, arguments.model_size(args))
    workload = requests(args.requests, args.images, args.output_tokens, args.seed)
    rows = []
    total = len(args.cases) * args.repeats
    with tqdm(total=total, unit="repeat", disable=None) as progress:
        for case in args.cases:
            runs = measure(case, model, workload, args, progress)
            rows += summarize(case, runs)
    settings = {
        "model": model.describe(),
        "requests": len(workload),
        "prompt_tokens": workload[0].prompt_tokens,
        "output_tokens": args.output_tokens,
        "pool_requests": args.pool_requests,
        "repeats": args.repeats,
    }
    facts = machine()
    if not args.quick:
        append_rows(
            args.results / "operation.csv",
            [{**facts, **settings, **row} for row in rows],
        )
    print_heading("What operating costs", {**facts, **settings})
    print_table(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.make_parser(__doc__, SIZE)
    parser.set_defaults(repeats=5)
    add = parser.add_argument
    add("--requests", type=int, default=24, help="requests that wait at the start")
    add("--images", type=int, default=2, help="images a prompt, 576 tokens each")
    add("--output-tokens", type=int, default=128, help="of each request")
    add("--pool-requests", type=float, default=4.5, help="that fit the tight pool")
    add("--block-size", type=int, default=32, help="of all engines")
    add("--max-num-seqs", type=int, default=8, help="vLLM's cap")
    add(
        "--case",
        choices=[case.name for case in CASES],
        help="measure this one only",
    )
    args = parser.parse_args(argv)
    args.cases = [case for case in CASES if args.case in (None, case.name)]
    if args.quick:
        args.requests, args.output_tokens, args.repeats = 6, 16, 1
        args.pool_requests = 2.5
    return args


def measure(
    case: Case,
    model: checkpoints.Model,
    workload: Sequence[Request],
    args: argparse.Namespace,
    progress: tqdm,
) -> Runs:
    """Serve the workload with all variants, step by step."""
    longest = workload[0].num_tokens + args.block_size
    fitting = args.pool_requests if case.tight else 2 * args.max_num_seqs
    engines = {
        name: Engine(
            model,
            settings=variant.settings,
            collects_stats=variant.observed,
            pool_bytes=int(fitting * longest) * model.bytes_per_token,
            block_size=args.block_size,
            max_num_seqs=args.max_num_seqs,
            max_model_len=longest,
            threads=args.threads,
        )
        for name, variant in case.variants.items()
    }
    runs: Runs = {name: [] for name in engines}
    progress.set_description(case.name)
    for _ in range(args.repeats):
        for name, run in run_together(engines, workload).items():
            runs[name].append(run)
        progress.update()
    for engine in engines.values():
        engine.close()
    return runs


def summarize(case: Case, of_variant: Runs) -> list[dict[str, object]]:
    """Return a row a variant: its speed over the baseline's of the same turn."""
    baseline = next(iter(of_variant))
    rows = []
    for name, runs in of_variant.items():
        pairs = list(zip(runs, of_variant[baseline], strict=True))
        rates = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
        rows.append(
            {
                "case": case.name,
                "variant": name,
                "adapted": len(runs[-1].adapted),
                "peak_running": max(max(run.running) for run in runs),
                "preemptions": runs[-1].preemptions,
                **spread("tokens_per_s", [run.tokens_per_second for run in runs]),
                "baseline": baseline,
                **spread("ratio", rates),
                **spread(
                    "cpu_ratio", [b.cpu_seconds / a.cpu_seconds for a, b in pairs]
                ),
            }
        )
    return rows


if __name__ == "__main__":
    main()
