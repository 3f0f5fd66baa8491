"""Stock vLLM against `avl` end to end: `vllm serve`, asked by `vllm bench serve`.

`latency` has a pool that holds all requests and measures decoding by concurrency;
`throughput` has one that holds a few stock requests at a time, and all wait from the
start. The servers take turns, once a repeat, one alone unless `--together`, and every
ratio is to stock of the same repeat. All `avl` variants ask one `avl` server, which
they tell their ratios by request. `avl` works over the attention that stock chooses:
with all ratios 1 it must give stock's tokens before it is timed. `--triton` adds stock
with TRITON_ATTN.

The weights are vLLM's dummies. Their attention is almost even, so which tokens are
core changes at every refresh (the dearest case) and tokens agree more easily than a
real model's: answers say nothing about accuracy, and the gate finds gross faults only.
Running requests are as /metrics has them, those in prefill included. ITL is the time
between chunks as they arrive, often several at once where a step is short: ratios are
of TPOT, which does not mind.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import torch
from matplotlib import pyplot
from tqdm import tqdm

from benchmarks import served_models
from benchmarks.figures import save
from benchmarks.gpu.environment import gpu
from benchmarks.harness import CHECKPOINTS, Benchmark, Report, main
from benchmarks.report import ratios, spread
from benchmarks.served_models import MODELS, Client, Run, Workload
from vllm_avl.demo.server import ONE_THREAD, Server, ServerError, serve

STOCK, AVL, TRITON = "stock", "avl", "stock TRITON_ATTN"
GATE_TOKENS = 16
WARM_UP_TOKENS = 32
WARM_UPS = ("run", "request")
"""By the client, as it then measures; or one request, enough where graphs are."""
CUDA = torch.cuda.is_available()
ALL_KEPT = {"avl_store_ratio": 1.0, "avl_core_ratio": 1.0}
SETTINGS: dict[str, type] = {
    "avl_store_ratio": float,
    "avl_core_ratio": float,
    "avl_refresh_interval": int,
}
QUICK: dict[str, object] = {
    "repeats": 1,
    "requests": 8,
    "concurrency": [1, 2],
    "rounds": 1,
    "pool_requests": 2.5,
    "scrape_seconds": 0.2,
    "warm_up": "request",
    "enforce_eager": True,
}
"""What other options are by default."""
CLIENT_FACTS = {
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "tpot_p90_ms": "p90_tpot_ms",
    "itl_ms": "median_itl_ms",
    "itl_p90_ms": "p90_itl_ms",
}
RATIOS = {
    "tokens_ratio": "output_throughput",
    "tpot_ratio": "median_tpot_ms",
}
SHOWN = {
    "latency": (
        *("variant", "concurrency", "peak_running", "preemptions"),
        *("tpot_ms", "tpot_p90_ms", "itl_ms", "itl_p90_ms", "tpot_ratio"),
    ),
    "throughput": (
        *("variant", "peak_running", "mean_running", "preemptions", "ttft_ms"),
        *("tokens_per_s", "tokens_per_s_p10", "tokens_per_s_p90", "tokens_ratio"),
    ),
}


@dataclass(frozen=True)
class Side:
    """A server's own options, and the request arguments of its variants by name."""

    name: str
    options: Sequence[str]
    variants: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Load:
    """What one measurement asks of every server."""

    name: str
    concurrencies: Sequence[int]
    rounds: int
    """Requests of a run for each that runs at a time."""
    pool_requests: float
    """Stock requests that the pool holds at once."""


Runs = dict[tuple[str, int], list[Run]]
"""By variant and concurrency, one a repeat."""


def measure(args: argparse.Namespace, report: Report) -> None:
    """Start servers and ask them, for one measurement after the other."""
    # The default would end this process at once and leave a server behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = served_models.write(args.model, args.checkpoints / f"dummy-{args.model}")
    for load in loads(args):
        try:
            bench = Bench(args, folder, load)
            runs = bench.measure()
        except (ServerError, httpx.HTTPError, openai.APIError) as error:
            raise SystemExit(f"{error}\nlogs: {args.logs}") from error
        facts, rows = {**gpu(), **bench.settings}, summarize(load, runs)
        report.keep("serving", facts, rows)
        shown = [{name: row[name] for name in SHOWN[load.name]} for row in rows]
        report.show(f"Serving, {load.name}", facts, shown)
        report.draw(f"serving-{load.name}-{args.model}", draw, load, runs)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="tiny", help="shape of the model")
    add("--measure", nargs="+", choices=list(SHOWN), default=list(SHOWN), help="what")
    add(
        "--settings",
        nargs="+",
        default=["0.5", "0.5,0.3,3"],
        metavar="S[,C[,K]]",
        help="of the avl variants: ratios stored and core, refresh interval",
    )
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32], help="of latency")
    add("--rounds", type=int, default=3, help="latency requests / concurrency")
    add("--requests", type=int, default=64, help="of throughput, all at once")
    add("--pool-requests", type=float, default=6.5, help="stock requests that fit then")
    add("--images", type=int, help="a prompt; the model's own number unless given")
    add("--text-tokens", type=int, default=64, help="random text of a prompt")
    add("--output-tokens", type=int, default=256, help="of every answer")
    add("--block-size", type=int, default=16 if CUDA else 32, help="of all servers")
    add("--dtype", default="bfloat16", help="of all servers")
    add("--enforce-eager", action="store_true", help="no graphs, no compilation")
    add("--compilation-config", metavar="JSON", help="of all servers")
    add("--together", action="store_true", help="start servers at once; one is asked")
    add("--triton", action="store_true", help="also stock with TRITON_ATTN; CUDA")
    add("--repeats", type=int, default=3, help="turns of each server")
    add("--warm-up", choices=WARM_UPS, default=WARM_UPS[0], help="of each variant")
    add("--seed", type=int, default=0, help="of the first run's pictures and text")
    add("--scrape-seconds", type=float, default=1.0, help="between looks at /metrics")
    add("--start-seconds", type=float, default=900, help="a server may take to start")
    add("--run-seconds", type=float, default=1800, help="a client may take")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the models")
    add("--logs", type=Path, default=CHECKPOINTS / "serving-logs", help="folder, kept")


def check(args: argparse.Namespace) -> None:
    """Read the settings, and make the workload of the lengths."""
    args.settings = [setting(text) for text in args.settings]
    model = MODELS[args.model]
    lengths = (args.images or model.images, args.text_tokens, args.output_tokens)
    args.workload = Workload(model, *lengths, args.block_size, args.dtype)


def setting(text: str) -> dict[str, float]:
    """Read "S,C,K" as the request arguments that say so."""
    parts = text.split(",")
    if len(parts) > len(SETTINGS):
        raise ValueError(f"--settings {text} must be S, S,C or S,C,K")
    pairs = zip(SETTINGS.items(), parts, strict=False)
    return {name: kind(part) for (name, kind), part in pairs}


def loads(args: argparse.Namespace) -> Iterator[Load]:
    """Yield the measurements that were asked for."""
    if "latency" in args.measure:
        fits = max(args.concurrency) + 1
        yield Load("latency", args.concurrency, args.rounds, fits)
    if "throughput" in args.measure:
        yield Load("throughput", [args.requests], 1, args.pool_requests)


def sides(settings: Sequence[Mapping[str, float]], triton: bool) -> list[Side]:
    """Return the servers in their order."""
    named = {
        " ".join(f"{k}={v:g}" for k, v in zip("SCK", one.values(), strict=False)): one
        for one in settings
    }
    on_triton = Side(TRITON, ["--attention-backend", "TRITON_ATTN"], {TRITON: {}})
    return [
        Side(STOCK, [], {STOCK: {}}),
        *([on_triton] if triton else []),
        Side(AVL, ["--attention-backend", "avl"], named),
    ]


class Bench:
    """One measurement: starts its servers in turn and asks each the same."""

    def __init__(self, args: argparse.Namespace, folder: Path, load: Load) -> None:
        self._args, self._folder, self._load = args, folder, load
        self._sides = sides(args.settings, args.triton)
        self._answers: dict[str, list[int]] = {}
        # No two runs share pictures: caches of prefixes and encodings would be hit.
        self._seeds = itertools.count(args.seed)
        self.settings: dict[str, object] = {
            name: getattr(args, name)
            for name in ("model", "dtype", "block_size", "enforce_eager")
        }
        self.settings["images"] = args.workload.images

    def measure(self) -> Runs:
        """Run every variant `args.repeats` times, the servers taking turns.

        Raises:
            ServerError: a server or its client failed.
            SystemExit: the servers' tokens differ where they must not.
        """
        runs: Runs = {}
        repeats = range(self._args.repeats)
        variants = sum(len(side.variants) for side in self._sides)
        total = variants * len(repeats) * len(self._load.concurrencies)
        with tqdm(total=total, unit="run", disable=None) as progress:
            for repeat in repeats:
                with ExitStack() as stack:
                    servers = [self._serve(side, repeat) for side in self._sides]
                    if self._args.together:
                        servers = start(servers, stack)
                    for side, started in zip(self._sides, servers, strict=True):
                        progress.set_description(f"{self._load.name}, {side.name}")
                        with started as server:
                            self._check_tokens(server, side)
                            for key, run in self._runs(server, side):
                                runs.setdefault(key, []).append(run)
                                progress.update()
        return runs

    def _serve(self, side: Side, repeat: int) -> AbstractContextManager[Server]:
        """Return a server to be: all have the same options but for the back end."""
        logs = self._args.logs / f"{self._load.name}-{repeat}-{side.name}"
        seqs = max(self._load.concurrencies)
        options = ["--enforce-eager"] if self._args.enforce_eager else []
        if self._args.compilation_config:
            options += ["--compilation-config", self._args.compilation_config]
        if self._args.together and CUDA:
            # vLLM wants that much free, and takes the bytes it is told.
            options += ["--gpu-memory-utilization", "0.3"]
        common = self._args.workload.server_options(self._load.pool_requests, seqs)
        return serve(
            self._folder,
            [*common, *options, *side.options],
            log=logs / "server.log",
            timeout=self._args.start_seconds,
            environment={} if CUDA else ONE_THREAD,
            report=tqdm.write,
        )

    def _check_tokens(self, server: Server, side: Side) -> None:
        """Refuse to time `avl` unless S = C = 1 gives stock's tokens."""
        xargs = ALL_KEPT if side.name == AVL else {}
        tokens = self._ask(server, xargs, GATE_TOKENS)
        self._answers[side.name] = tokens
        if side.name != AVL:
            return
        for name in self._answers.keys() - {AVL}:
            pairs = zip(tokens, self._answers[name], strict=True)
            same = sum(ours == theirs for ours, theirs in pairs)
            tqdm.write(f"S = C = 1 and {name}: {same} of {len(tokens)} tokens agree")
        if tokens != self._answers[STOCK]:
            raise SystemExit(
                f"S = C = 1 gives {tokens}, stock {self._answers[STOCK]}: "
                f"nothing is reported; logs: {self._args.logs}"
            )

    def _ask(self, server: Server, xargs: Mapping[str, float], count: int) -> list[int]:
        """Return `count` tokens about the workload's pictures."""
        extra = {"ignore_eos": True, "return_token_ids": True}
        answer = server.client().chat.completions.create(
            model=server.model,
            messages=[self._args.workload.question()],
            max_tokens=count,
            temperature=0,
            extra_body=extra | ({"vllm_xargs": dict(xargs)} if xargs else {}),
        )
        return answer.choices[0].token_ids

    def _runs(
        self, server: Server, side: Side
    ) -> Iterator[tuple[tuple[str, int], Run]]:
        """Yield a run of each concurrency and variant, the variants taking turns."""
        metrics = server.metrics()
        self.settings["pool_tokens"] = metrics.num_blocks * metrics.block_size
        workload = self._args.workload
        limits = (self._args.scrape_seconds, self._args.run_seconds)
        for concurrency, name in itertools.product(
            self._load.concurrencies, side.variants
        ):
            client = Client(server, side.variants[name], concurrency, *limits)
            stem = server.log.parent / f"{name}-{concurrency}"
            if self._args.warm_up == "request":
                self._ask(server, side.variants[name], WARM_UP_TOKENS)
            else:
                short = replace(workload, output_tokens=WARM_UP_TOKENS)
                client.run(short, concurrency, next(self._seeds), stem)
            count = concurrency * self._load.rounds
            run = client.run(workload, count, next(self._seeds), stem)
            self.settings["prompt_tokens"] = run.facts["total_input_tokens"] // count
            self.settings["output_tokens"] = workload.output_tokens
            yield (name, concurrency), run


def start(
    servers: Sequence[AbstractContextManager[Server]], stack: ExitStack
) -> list[AbstractContextManager[Server]]:
    """Start all servers at once; `stack` stops them.

    Raises:
        ServerError: one did not start.
    """
    with ThreadPoolExecutor() as threads:
        return [nullcontext(x) for x in threads.map(stack.enter_context, servers)]


def summarize(load: Load, runs: Runs) -> list[dict[str, object]]:
    """Return a row a variant and concurrency; ratios are to stock of the same turn."""
    rows = []
    for (name, concurrency), of_one in runs.items():
        stock = runs[STOCK, concurrency]
        rates = [run.facts["output_throughput"] for run in of_one]
        row = {
            "measurement": load.name,
            "variant": name,
            "concurrency": concurrency,
            "peak_running": max(run.peak_running for run in of_one),
            "mean_running": statistics.fmean(run.mean_running for run in of_one),
            "preemptions": statistics.median(run.preemptions for run in of_one),
            **spread("tokens_per_s", rates),
        }
        for column, fact in CLIENT_FACTS.items():
            row[column] = statistics.median(run.facts[fact] for run in of_one)
        for column, fact in RATIOS.items():
            row |= ratios(column, of_one, stock, lambda run, fact=fact: run.facts[fact])
        rows.append(row)
    return rows


def draw(load: Load, runs: Runs, file: Path) -> None:
    """Draw TPOT over concurrency, or requests running over time if it is one."""
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for name in dict.fromkeys(name for name, _ in runs):
        if load.name == "latency":
            tpots = [
                statistics.median(run.facts["median_tpot_ms"] for run in runs[name, c])
                for c in load.concurrencies
            ]
            axes.plot(load.concurrencies, tpots, marker="o", label=name)
        else:
            first = runs[name, load.concurrencies[0]][0].running
            seconds, running = zip(*first, strict=True)
            axes.plot([s - seconds[0] for s in seconds], running, label=name)
    latency = load.name == "latency"
    axes.set_xlabel("concurrency" if latency else "seconds")
    axes.set_ylabel("median TPOT (ms)" if latency else "running requests")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend()
    save(figure, file)


BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, check)

if __name__ == "__main__":
    main(BENCHMARK)
