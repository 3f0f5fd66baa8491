"""Host time of a decode step over stock's: builder, worker and whole steps.

The model is the smallest vLLM takes, and many requests decode at once, so that a step
is mostly Python. The engines take a step each in turn; steps that compute a prompt or
in which some request does not decode are left out. Times are per request and step.
`builder` is the attention metadata builder's `build`, `before` the worker's time up to
the model's forward pass, the builder's included, `pass` that pass, `after` the worker's
time behind it, sampling included, and `step` the engine's whole step from outside, the
scheduler's included. Refreshes of core are part of the pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

from benchmarks import checkpoints
from benchmarks.engines import (
    STOCK,
    Engine,
    Request,
    requests,
    run_together,
    started,
)
from benchmarks.gate import check_loops
from benchmarks.harness import Benchmark, Report, main, model_size
from benchmarks.plots import draw_host_time
from benchmarks.report import ratios, spread
from benchmarks.runs import Run
from benchmarks.testing.models import ModelSize

SIZE = ModelSize(
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_size=32,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=32,
)
STORE = {"store_ratio": 0.5}
CORE = STORE | {"core_ratio": 0.3, "refresh_interval": 3}
VARIANTS: dict[str, Mapping[str, Any]] = {
    STOCK: {"settings": None},
    "S=0.5": {"settings": STORE},
    "S=0.5 C=0.3 K=3": {"settings": CORE},
}
WORKER_PARTS = ("builder", "before", "pass", "after")
PARTS = (*WORKER_PARTS, "step")


@dataclass
class Watch:
    """Seconds of the worker's parts, by step."""

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in WORKER_PARTS}
    )
    started: float = 0.0

    def worker(self, execute_model: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the worker's `execute_model`, with which a step begins."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            for times in self.seconds.values():
                times.append(0.0)
            self.started = time.perf_counter()
            output = execute_model(*args, **kwargs)
            self.seconds["after"][-1] += time.perf_counter() - self.started
            return output

        return timed

    def model(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the model's pass: what comes before it, and when `after` begins."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            entered = time.perf_counter()
            self.seconds["before"][-1] += entered - self.started
            output = forward(*args, **kwargs)
            self.started = time.perf_counter()
            self.seconds["pass"][-1] += self.started - entered
            return output

        return timed

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what is added to `name` as a whole."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = function(*args, **kwargs)
            self.seconds[name][-1] += time.perf_counter() - start
            return output

        return timed


@dataclass
class Times:
    """Seconds of one run's steps in which all requests decode, by part."""

    seconds: dict[str, list[float]]

    def per_request(
        self, part: str, count: int, average: Callable[[Sequence[float]], float]
    ) -> float:
        """Microseconds for each of `count` requests, averaged over the steps."""
        return 1e6 * average(self.seconds[part]) / count

    def median_step(self) -> float:
        """Seconds of a whole step."""
        return statistics.median(self.seconds["step"])


Measured = dict[str, list[Times]]


def measure(args: argparse.Namespace, report: Report) -> None:
    """Serve one workload on all engines, with room for everything."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    workload = requests(args.requests, 1, args.output_tokens, args.seed)
    longest = workload[0].num_tokens + args.block_size
    sizes = {
        "pool_bytes": (len(workload) + 1) * longest * model.bytes_per_token,
        "block_size": args.block_size,
        "max_num_seqs": len(workload),
        "max_model_len": longest,
        "max_num_batched_tokens": args.prefill_tokens,
        "threads": args.threads,
    }
    with started(model, VARIANTS, **sizes) as engines:
        for name, engine in engines.items():
            print(f"{name}: {engine.describe()}")
        check(engines, workload)
        rows = summarize(run_all(engines, workload, args.repeats), len(workload))
    settings = {
        "model": model.describe(),
        "block_size": args.block_size,
        "requests": len(workload),
        "prompt_tokens": workload[0].prompt_tokens,
        "output_tokens": args.output_tokens,
        "repeats": args.repeats,
    }
    # Percentiles and means of all but the builder are in the CSV alone.
    hidden = "^(?!builder).*(_p10|_p90|_mean_over)$"
    title = "Host time per request and decode step"
    report.add("host_time", title, settings, rows, hidden)
    report.draw("host_time", draw_host_time, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.set_defaults(repeats=5)
    add = parser.add_argument
    add(
        "--requests",
        type=int,
        default=128,
        help="that decode at once, one picture each",
    )
    add("--output-tokens", type=int, default=64, help="of each request")
    add("--prefill-tokens", type=int, default=16384, help="vLLM's cap for a step")
    add("--block-size", type=int, default=32, help="of all engines")


def check(engines: Mapping[str, Engine], workload: Sequence[Request]) -> None:
    """Refuse to time anything unless `avl: 0` gives stock's tokens; warm all up.

    By their own settings the others must hold fewer blocks.
    """
    sample = [replace(request, output_tokens=8) for request in workload]
    stock = engines[STOCK].run(sample)
    for name, engine in engines.items():
        if name == STOCK:
            continue
        off = engine.run(sample, {"avl": 0})
        if list(off.outputs.values()) != list(stock.outputs.values()):
            raise SystemExit(f"{name}: `avl: 0` and stock give different tokens")
        check_loops(engine, sample[:2])
        if not engine.run(sample).holds_less_than(stock):
            raise SystemExit(f"{name} holds as many blocks as stock")
    print("checked: `avl: 0` gives stock's tokens, and avl holds fewer blocks")


def run_all(
    engines: Mapping[str, Engine], workload: Sequence[Request], repeats: int
) -> Measured:
    """Serve the workload `repeats` times, a step of each engine in turn."""
    measured: Measured = {name: [] for name in engines}
    for _ in tqdm(range(repeats), unit="repeat", disable=None):
        with ExitStack() as stack:
            watches = {
                name: stack.enter_context(watched(engine.worker))
                for name, engine in engines.items()
            }
            runs = run_together(engines, workload)
        for name, run in runs.items():
            measured[name].append(decode_steps(watches[name], run, len(workload)))
    return measured


@contextmanager
def watched(worker: Any) -> Iterator[Watch]:
    """Time the parts of `worker`'s steps, all on its own objects."""
    watch, runner = Watch(), worker.model_runner
    wrappers = [
        (worker, "execute_model", watch.worker(worker.execute_model)),
        (worker, "sample_tokens", watch.part("after", worker.sample_tokens)),
        (runner, "_model_forward", watch.model(runner._model_forward)),
    ]
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = group.get_metadata_builder()
        wrappers.append((builder, "build", watch.part("builder", builder.build)))
    with ExitStack() as patches:
        for target, name, wrapper in wrappers:
            patches.enter_context(patch.object(target, name, wrapper))
        yield watch


def decode_steps(watch: Watch, run: Run, count: int) -> Times:
    """Return the steps in which `count` requests decode and no prompt is computed."""
    parts = {**watch.seconds, "step": run.step_seconds}
    chosen = [
        index
        for index, is_prompt in enumerate(run.prompt_step)
        if not is_prompt and run.running[index] == count
    ]
    if not chosen:
        raise SystemExit(f"no step decodes {count} requests: ask for more tokens")
    assert all(len(times) == len(run.running) for times in parts.values())
    return Times({name: [parts[name][i] for i in chosen] for name in PARTS})


def summarize(measured: Measured, count: int) -> list[dict[str, object]]:
    """Return a row a variant: microseconds, and how many over stock's of its turn."""
    rows = []
    for name, of_one in measured.items():
        row: dict[str, object] = {
            "variant": name,
            "steps": len(of_one[0].seconds["step"]),
        }
        for part in PARTS:
            medians, means = (
                [
                    [one.per_request(part, count, average) for one in turns]
                    for turns in (of_one, measured[STOCK])
                ]
                for average in (statistics.median, statistics.fmean)
            )
            row |= {
                f"{part}_us": statistics.median(medians[0]),
                **spread(f"{part}_over", differences(*medians)),
                f"{part}_mean_over": statistics.median(differences(*means)),
            }
        row |= ratios("step_ratio", of_one, measured[STOCK], Times.median_step)
        rows.append(row)
    return rows


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return what each of ours is over theirs of the same turn."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


QUICK = {"requests": 8, "output_tokens": 16, "repeats": 1}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, size=SIZE)

if __name__ == "__main__":
    main(BENCHMARK)
