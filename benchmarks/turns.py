"""Chats about pictures with the prefix cache on, and what a later turn costs.

`turns` asks one request at a time: a turn's prompt is the whole chat so far, and the
time to its first token is what the prefix cache did not save. Stock and `avl` answer
the turns of the same chats in turn. TTFT counts from adding the request, which resizes
the pictures in this process; `steps_ratio` is of the engine's steps alone.
`offloaded` does the same where the pool has forgotten the chat before each later turn,
and the host's memory has it: vLLM's offloading, whose copies are made without a GPU.
`chats` has several chats at once in a pool that is short, each asking on as soon as it
is answered. `questions` has many different questions about the same pictures, which
were asked about before, in a pool that is shorter still. Answers are greedy and of one
length.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from benchmarks import checkpoints, short_pool
from benchmarks.conversation import Chat, Pictures, ask, begin, longest
from benchmarks.engines import (
    AVL,
    STOCK,
    Engine,
    started,
)
from benchmarks.gate import checked_loops
from benchmarks.harness import Benchmark, Report, main, model_size, rotated
from benchmarks.plots import draw_turns
from benchmarks.report import ratios, spread
from benchmarks.runs import Run, median
from benchmarks.short_pool import Load
from benchmarks.testing.models import ModelSize

SIZE = ModelSize(
    hidden_size=512,
    intermediate_size=1024,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=64,
)
Engines = dict[str, Engine]
Turns = dict[tuple[int, int], dict[str, list[Run]]]
"""By pictures and turn, then by engine, one a repeat."""


def measure(args: argparse.Namespace, report: Report) -> None:
    """Measure each part, and draw the turns."""
    model = checkpoints.build(args.checkpoints, model_size(args), args.dtype)
    pictures = Pictures(args.seed)
    if args.images:
        report_turns(model, pictures, args, report)
    if args.offloaded:
        report_turns(model, pictures, args, report, forgets=True)
    loads = [("chats", args.chats, pool) for pool in args.pool_requests]
    for load in [*loads, ("questions", args.questions, args.question_pool)]:
        if load[1]:
            report_together(*load, model, pictures, args, report)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.set_defaults(repeats=7)
    add = parser.add_argument
    add(
        "--images",
        type=int,
        nargs="*",
        default=[1, 4],
        help="pictures of a chat in `turns`, 576 tokens each; none leaves it out",
    )
    add(
        "--offloaded",
        type=int,
        nargs="*",
        default=[1, 4],
        help="the same of `offloaded`; none leaves it out",
    )
    add("--turns", type=int, default=3, help="of every chat")
    add("--output-tokens", type=int, default=16, help="of an answer in the first two")
    add("--chats", type=int, default=8, help="at once in `chats`; 0 leaves it out")
    add("--questions", type=int, default=16, help="in `questions`; 0 leaves it out")
    add("--pool-images", type=int, default=4, help="pictures in the last two parts")
    add("--pool-output-tokens", type=int, default=64, help="of an answer there")
    add(
        "--pool-requests",
        type=float,
        nargs="+",
        default=[3.5, 6.5],
        help="last turns that `chats` has room for; one table for each",
    )
    add(
        "--question-pool",
        type=float,
        default=1.5,
        help="requests that `questions` has room for",
    )
    add("--store-ratio", type=float, help="S below 1; unless given, avl's default")
    add("--block-size", type=int, default=32, help="of both sides")


def check_ratio(args: argparse.Namespace) -> None:
    """Refuse a ratio with which nothing would be evicted."""
    if args.store_ratio is not None and args.store_ratio >= 1:
        raise ValueError(f"--store-ratio {args.store_ratio:g} must be below 1")


@contextmanager
def both(
    model: checkpoints.Model,
    pool_tokens: int,
    length: int,
    args: argparse.Namespace,
    host_tokens: int = 0,
) -> Iterator[Engines]:
    """Start stock and `avl` with the same options; avl's settings are its defaults."""
    ratio = args.store_ratio
    settings = {} if ratio is None else {"store_ratio": ratio}
    blocks = -(-pool_tokens // args.block_size) + 1
    with started(
        model,
        {STOCK: {"settings": None}, AVL: {"settings": settings}},
        pool_bytes=blocks * args.block_size * model.bytes_per_token,
        block_size=args.block_size,
        max_num_seqs=max(args.chats, args.questions, 1),
        max_model_len=length + args.block_size,
        threads=args.threads,
        host_bytes=host_tokens * model.bytes_per_token,
    ) as engines:
        for name, engine in engines.items():
            print(f"{name}: {engine.describe()}")
            if not engine.in_force["prefix_caching"]:
                raise SystemExit(f"{name} has no prefix cache: nothing was timed")
        yield engines


def check(
    engines: Engines,
    pictures: Pictures,
    counts: Sequence[int],
    forgets: bool,
    args: argparse.Namespace,
) -> None:
    """Refuse to time anything unless `avl: 0` is stock in every turn, and S is not.

    Tokens and hits must be the same, and by its defaults `avl` must hold fewer blocks.
    Later turns must find the chat, in the pool or on the host.
    """
    for num_images in counts:
        images = pictures.take(num_images)
        runs = {}
        for name, xargs in ((STOCK, None), (AVL, {"avl": 0}), ("adaptive", None)):
            chat = begin(images, args.output_tokens)
            engine = engines[STOCK if name == STOCK else AVL]
            runs[name] = [
                next_turn(engine, chat, forgets, xargs) for _ in range(args.turns)
            ]
        for turn, (stock, off, adaptive) in enumerate(zip(*runs.values(), strict=True)):
            where = f"turn {turn + 1} with {num_images} pictures"
            pairs = zip(stock.outputs.values(), off.outputs.values(), strict=True)
            if any(theirs != ours for theirs, ours in pairs):
                raise SystemExit(f"{where}: `avl: 0` and stock give different tokens")
            if not adaptive.holds_less_than(stock):
                raise SystemExit(f"{where}: avl holds as many blocks as stock")
            if turn and not all(map(hits, (stock, off, adaptive))):
                raise SystemExit(f"{where}: the chat is found nowhere")
    print(
        f"checked: `avl: 0` gives stock's tokens in {args.turns} turns; avl holds less"
    )


def next_turn(
    engine: Engine,
    chat: Chat,
    forgets: bool,
    xargs: dict[str, float] | None = None,
) -> Run:
    """Have the next turn answered; `forgets` as in `report_turns`."""
    if forgets and chat.turn > 1:
        engine.flush()
    return ask(engine, chat, xargs)[0]


def report_turns(
    model: checkpoints.Model,
    pictures: Pictures,
    args: argparse.Namespace,
    report: Report,
    forgets: bool = False,
) -> None:
    """Measure one turn at a time.

    Args:
        model: served.
        pictures: to ask about.
        args: from the command line.
        report: takes the rows.
        forgets: whether only the host has a chat when its next turn comes.
    """
    counts = args.offloaded if forgets else args.images
    length = longest(max(counts), args.turns, args.output_tokens)
    with both(model, 2 * length, length, args, 4 * length * forgets) as engines:
        check(engines, pictures, counts, forgets, args)
        chat = begin(pictures.take(min(counts)), args.output_tokens)
        with checked_loops(engines[AVL]):
            for _ in range(args.turns):
                next_turn(engines[AVL], chat, forgets)
        turns = measure_turns(engines, pictures, counts, forgets, args)
        rows = summarize_turns(turns, engines[STOCK])
        settings = {
            "model": model.describe(),
            "store_ratio": engines[AVL].in_force["store_ratio"],
            "block_size": args.block_size,
            "output_tokens": args.output_tokens,
            "repeats": args.repeats,
        }
    # Percentiles of all but the ratio, and CPU ratios, are in the CSV alone.
    hidden = r"^(?!ratio).*(_p\d\d$|cpu)"
    title = "A turn of a chat, one request at a time"
    name = "offloaded" if forgets else "turns"
    if forgets:
        title += ", found on the host"
    report.add(name, title, settings, rows, hidden)
    report.draw(name, draw_turns, rows)


def measure_turns(
    engines: Engines,
    pictures: Pictures,
    counts: Sequence[int],
    forgets: bool,
    args: argparse.Namespace,
) -> Turns:
    """Hold chats about fresh pictures, every turn on each engine in turn."""
    turns: Turns = {}
    total = args.repeats * len(counts) * args.turns * len(engines)
    with tqdm(total=total, unit="turn", disable=None) as progress:
        for repeat in range(args.repeats):
            for num_images in counts:
                images = pictures.take(num_images)
                chats = {name: begin(images, args.output_tokens) for name in engines}
                for turn in range(1, args.turns + 1):
                    runs = turns.setdefault(
                        (num_images, turn), {name: [] for name in engines}
                    )
                    for name in rotated(list(engines), repeat + turn):
                        progress.set_description(f"{num_images} pictures, {name}")
                        runs[name].append(
                            next_turn(engines[name], chats[name], forgets)
                        )
                        progress.update()
    return turns


def summarize_turns(turns: Turns, stock: Engine) -> list[dict[str, object]]:
    """Return a row for each number of pictures and turn; over 1 means slower."""
    rows = []
    num_blocks = stock.pool_tokens / stock.block_size
    for (num_images, turn), runs in turns.items():
        row: dict[str, object] = {
            "pictures": num_images,
            "turn": turn,
            "prompt_tokens": median(runs[STOCK], prompt_tokens),
        }
        for name, of_one in runs.items():
            row |= {
                **spread(f"{name}_ttft_ms", [1e3 * ttft(run) for run in of_one]),
                f"{name}_front_end_ms": median(
                    of_one, lambda run: 1e3 * run.front_end_seconds
                ),
                f"{name}_answer_ms": median(of_one, lambda run: 1e3 * whole(run)),
                f"{name}_hits": median(of_one, hits),
                f"{name}_blocks": median(
                    of_one, lambda run: num_blocks * run.pool_use[-1]
                ),
            }
        for column, value in (
            ("ratio", ttft),
            ("steps_ratio", lambda run: run.first_token_seconds),
            ("cpu_ratio", lambda run: run.first_token_cpu_seconds),
            ("answer_ratio", whole),
        ):
            row |= ratios(column, runs[AVL], runs[STOCK], value)
        rows.append(row)
    return rows


def ttft(run: Run) -> float:
    """Seconds from adding the only request to its first token."""
    return run.front_end_seconds + run.first_token_seconds


def whole(run: Run) -> float:
    """Seconds from adding the only request to the end of its answer."""
    return run.front_end_seconds + run.seconds


def hits(run: Run) -> int:
    """Tokens of the prompt that the prefix cache had."""
    return sum(run.cached_tokens.values())


def prompt_tokens(run: Run) -> int:
    """Length of the prompt."""
    return sum(run.prompt_tokens.values())


def report_together(
    part: str,
    count: int,
    pool_requests: float,
    model: checkpoints.Model,
    pictures: Pictures,
    args: argparse.Namespace,
    report: Report,
) -> None:
    """Measure `count` requests at once in a short pool."""
    num_turns = args.turns if part == "chats" else 1
    length = longest(args.pool_images, num_turns, args.pool_output_tokens)
    length += args.block_size  # a question's number, and rounding to whole blocks
    load = Load(part, count, args.pool_images, num_turns, args.pool_output_tokens)
    with both(model, int(pool_requests * length), length, args) as engines:
        short_pool.check(load, engines, pictures)
        runs = short_pool.run_all(load, engines, pictures, args.repeats)
        settings = {
            "model": model.describe(),
            "store_ratio": engines[AVL].in_force["store_ratio"],
            "block_size": args.block_size,
            "pool_tokens": engines[STOCK].pool_tokens,
            "pool_requests": pool_requests,
            "pictures": args.pool_images,
            "turns": num_turns,
            "output_tokens": args.pool_output_tokens,
            "repeats": args.repeats,
            "part": part,
            "requests_at_once": count,
        }
    title = f"Requests at once in a short pool: {part}"
    report.add("chats", title, settings, short_pool.summarize(runs), hidden="cpu")


QUICK = {
    **{
        "images": [1],
        "offloaded": [1],
        "output_tokens": 8,
        "repeats": 2,
        "chats": 3,
        "questions": 4,
    },
    **{"pool_images": 1, "pool_output_tokens": 12, "pool_requests": [2.2]},
    **{"num_layers": 2, "hidden_size": 128, "num_heads": 2, "num_kv_heads": 2},
}
BENCHMARK = Benchmark(
    __doc__, measure, add_options, {"quick": QUICK}, check_ratio, size=SIZE
)

if __name__ == "__main__":
    main(BENCHMARK)
