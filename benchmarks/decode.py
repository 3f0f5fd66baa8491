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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import arguments
import checkpoints
import torch
from engines import Engine, Request, Run, requests
from plots import draw_decode
from report import append_rows, machine, print_heading, print_table, spread
from tqdm import tqdm

from vllm_avl.testing.models import ModelSize

STOCK = "stock"
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
VARIANTS = (Variant(0.5, 0.3, 3), Variant(0.3, 0.1, 8), Variant(0.5, 0.5, 0))


@dataclass
class Refreshes:
    """What refreshes took, one of one request in one layer at a time."""

    whole: list[float] = field(default_factory=list)
    attend: list[float] = field(default_factory=list)
    """Attention and scores."""
    move: list[float] = field(default_factory=list)
    num_rows_moved: list[int] = field(default_factory=list)
    """Rows that enter core, by KV head."""

    def milliseconds(self) -> dict[str, float]:
        """Medians, and the rows that a refresh brings into core."""
        if not self.whole:
            return {}
        return {
            "refresh_request_layer_ms": 1e3 * median(self.whole),
            "refresh_attend_ms": 1e3 * median(self.attend),
            "refresh_move_ms": 1e3 * median(self.move),
            "rows_into_core": median(self.num_rows_moved),
        }


@dataclass
class Steps:
    """What the decode steps of one run took, in the order they ran."""

    run: Run
    attention_seconds: list[float] = field(default_factory=list)
    num_scoring: list[int] = field(default_factory=list)
    """Requests that refresh, by step."""
    num_rows: list[int] = field(default_factory=list)
    """Cached rows that the attention of one layer reads, by step."""
    refreshes: Refreshes = field(default_factory=lambda: Refreshes())

    def seconds(self, refreshing: bool | None = None) -> list[float]:
        """Step times of decode steps: all, refreshing or ordinary ones."""
        return self._decode(self.run.step_seconds, refreshing)

    def attention(self, refreshing: bool | None = None) -> list[float]:
        """Time in the attention layers, likewise."""
        return self._decode(self.attention_seconds, refreshing)

    def rows(self, refreshing: bool | None = None) -> list[int]:
        """Rows read by one layer, likewise."""
        return self._decode(self.num_rows, refreshing)

    def _decode(self, values: list[Any], refreshing: bool | None) -> list[Any]:
        return [
            value
            for value, is_prompt, scoring in zip(
                values, self.run.prompt_step, self.num_scoring, strict=True
            )
            if not is_prompt and refreshing in (None, scoring > 0)
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, append to the CSV and draw the plot."""
    args = parse(argv)
    model = checkpoints.build(args.checkpoints, arguments.model_size(args))
    facts = machine()
    times: dict[str, list[tuple[int, float]]] = {}
    for num_images in args.images:
        workload = requests(args.requests, num_images, args.output_tokens, args.seed)
        bandwidth = copy_bandwidth(args.threads)
        measured = measure(model, workload, args)
        rows = summarize(measured, model, bandwidth)
        settings = {
            "model": model.describe(),
            "block_size": args.block_size,
            "requests": len(workload),
            "prompt_tokens": workload[0].prompt_tokens,
            "output_tokens": args.output_tokens,
            "repeats": args.repeats,
            "copy_gb_per_s": bandwidth / 1e9,
        }
        if not args.quick:
            append_rows(
                args.results / "decode.csv",
                [{**facts, **settings, **row} for row in rows],
            )
        print_heading("Decode steps", {**facts, **settings})
        print_table([shorten(row) for row in rows])
        for row in rows:
            point = workload[0].prompt_tokens, row["step_ms"]
            times.setdefault(row["variant"], []).append(point)
    draw_decode(times, args.results / f"decode{'-quick' if args.quick else ''}.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.make_parser(__doc__, SIZE)
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
    args = parser.parse_args(argv)
    if args.quick:
        args.requests, args.images, args.output_tokens = 2, [1], 20
        args.repeats = 1
    return args


def measure(
    model: checkpoints.Model, workload: Sequence[Request], args: argparse.Namespace
) -> dict[str, list[Steps]]:
    """Run stock and every variant, taking turns."""
    total = sum(request.num_tokens + args.block_size for request in workload)
    stock, avl = (
        Engine(
            model,
            avl=is_avl,
            pool_bytes=(total + args.block_size) * model.bytes_per_token,
            block_size=args.block_size,
            max_num_seqs=len(workload),
            max_model_len=workload[0].num_tokens + args.block_size,
            max_num_batched_tokens=total,
            threads=args.threads,
        )
        for is_avl in (False, True)
    )
    check_identity(stock, avl, workload)
    variants: dict[str, Variant | None] = {STOCK: None}
    variants |= {variant.name: variant for variant in VARIANTS}
    measured: dict[str, list[Steps]] = {name: [] for name in variants}
    rounds = args.repeats * len(variants)
    with tqdm(total=rounds, unit="run", disable=None) as progress:
        for _ in range(args.repeats):
            for name, variant in variants.items():
                progress.set_description(name)
                engine = stock if variant is None else avl
                xargs = None if variant is None else variant.xargs
                measured[name].append(run(engine, workload, xargs))
                progress.update()
    stock.close()
    avl.close()
    return measured


def check_identity(stock: Engine, avl: Engine, workload: Sequence[Request]) -> None:
    """Refuse to time anything unless S = C = T = 1 gives stock's tokens."""
    sample = [replace(request, output_tokens=8) for request in workload]
    expected = list(stock.run(sample).outputs.values())
    if list(avl.run(sample, SAME.xargs).outputs.values()) != expected:
        raise SystemExit("S = C = 1 and stock give different tokens: nothing was timed")


def run(
    engine: Engine, workload: Sequence[Request], xargs: Mapping[str, Any] | None
) -> Steps:
    """Serve `workload` once, and watch the attention of every step."""
    with watched() as steps:
        steps.run = engine.run(workload, xargs)
    return steps


@contextmanager
def watched() -> Iterator[Steps]:
    """Note time, rows and refreshes of the decoder's attention, step by step."""
    from vllm.v1.attention.backends import cpu_attn

    from vllm_avl.backend import cpu, step

    steps = Steps(Run())
    build = cpu_attn.CPUAttentionMetadataBuilder.build
    make_view = step.make_view

    def built(builder: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(builder, *args, **kwargs)
        steps.attention_seconds.append(0.0)
        steps.num_rows.append(int(metadata.seq_lens.sum()))
        steps.num_scoring.append(0)
        return metadata

    def viewed(*args: Any) -> Any:
        view = make_view(*args)
        pending.append(view)
        return view

    pending: list[Any] = []

    def timed(forward: Any) -> Any:
        def attend(impl: Any, *args: Any, **kwargs: Any) -> Any:
            while pending:
                count(steps, pending.pop())
            start = time.perf_counter()
            output = forward(impl, *args, **kwargs)
            if impl.attn_type == "decoder" and steps.attention_seconds:
                steps.attention_seconds[-1] += time.perf_counter() - start
            return output

        return attend

    stock, avl = cpu_attn.CPUAttentionBackendImpl, cpu.AVLImpl
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(patch.object(cpu_attn.CPUAttentionMetadataBuilder, "build", built))
        enter(patch.object(step, "make_view", viewed))
        for target, name, wrapper in refresh_watches(steps.refreshes):
            enter(patch.object(target, name, wrapper))
        enter(patch.object(avl, "forward", timed(avl.forward)))
        enter(patch.object(stock, "forward", once(timed, stock.forward, avl)))
        yield steps


def refresh_watches(seen: Refreshes) -> Iterator[tuple[type, str, Any]]:
    """Yield the methods that make up a refresh, wrapped to note their times."""
    from vllm_avl.backend.cpu_cache import CPUCache
    from vllm_avl.backend.layer import Layer

    def watch(function: Any, note: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            note(time.perf_counter() - start, *args)
            return result

        return timed

    def performed(seconds: float, layer: Any, task: Any, *rest: Any) -> None:
        if task.scores_while_attending:
            seen.whole.append(seconds)

    def moved(seconds: float, cache: Any, blocks: Any, moves: Any) -> None:
        if moves.exchange:
            seen.move.append(seconds)
            seen.num_rows_moved.append(len(moves.source))

    yield Layer, "perform", watch(Layer.perform, performed)
    yield (
        CPUCache,
        "attend",
        watch(CPUCache.attend, lambda seconds, *rest: seen.attend.append(seconds)),
    )
    yield CPUCache, "move", watch(CPUCache.move, moved)


def once(timed: Any, forward: Any, inner: type) -> Any:
    """Time `forward` unless it is called from within a timed subclass."""
    outer = timed(forward)

    def attend(impl: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = forward if isinstance(impl, inner) else outer
        return chosen(impl, *args, **kwargs)

    return attend


def count(steps: Steps, view: Any) -> None:
    """Add what a refresh reads, which the kernel is not given."""
    scoring = [task for task in view.tasks if task.scores_while_attending]
    steps.num_scoring[-1] = len(scoring)
    for task in scoring:
        steps.num_rows[-1] += task.num_tokens - task.first_read_token - 1


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
        pairs = list(zip(turns, measured[STOCK], strict=True))
        ratios = [median(a.seconds()) / median(b.seconds()) for a, b in pairs]
        means = [
            statistics.fmean(a.seconds()) / statistics.fmean(b.seconds())
            for a, b in pairs
        ]
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
                **spread("ratio", ratios),
                **spread("mean_ratio", means),
                **spread("refresh_ratio", refreshes or [float("nan")]),
                "rows_read": read,
                "attention_ms": 1e3 * attention,
                "bound_ms": 1e3 * bound,
                "attention_over_bound": attention / bound,
                "end_to_end_ratio": median(
                    [a.run.seconds / b.run.seconds for a, b in pairs]
                ),
                **refresh_columns(turns),
            }
        )
    return rows


def refresh_columns(turns: Sequence[Steps]) -> dict[str, float]:
    """Return what a refresh of one request in one layer is made of; NaN for none."""
    found = [turn.refreshes.milliseconds() for turn in turns]
    names = Refreshes([0.0], [0.0], [0.0], [0]).milliseconds()
    return {
        name: median([one.get(name, float("nan")) for one in found]) for name in names
    }


def median(values: Sequence[float]) -> float:
    """Median as a float."""
    return float(statistics.median(values))


def shorten(row: dict[str, Any]) -> dict[str, Any]:
    """Leave the percentiles of all but the step's ratio to the CSV."""
    hidden = ("mean_ratio_p", "refresh_ratio_p")
    return {name: v for name, v in row.items() if not name.startswith(hidden)}


if __name__ == "__main__":
    main()
