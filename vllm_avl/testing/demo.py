"""Asks a served model about pictures and shows how many KV blocks that held.

The blocks are read from the server's /metrics while the answer streams: once with
adaptive attention, once with `avl: 0` in the request, which is what stock vLLM does.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from PIL import Image

from vllm_avl.config import parse_config
from vllm_avl.testing import models
from vllm_avl.testing.server import (
    ONE_THREAD,
    Server,
    ServerError,
    json_option,
    picture_url,
    serve,
    user_message,
)

CACHE = Path(".cache")
SERVE_PORT = 8000
QUESTION = "What is in the picture?"
GIBBERISH = (
    "The demo model is small and its weights are random: the words are gibberish, the "
    "serving is real."
)
# The prompt's blocks come free in the step after its last chunk: skip the first words.
FIRST_SAMPLE = 8
SHORTEST_ANSWER = 100
EVERY_CHUNK = {"include_usage": True, "continuous_usage_stats": True}
ENOUGH = 3
"""Samples of a run that can be compared."""
ATTEMPTS = 5
"""A busy machine samples so seldom that an answer may end before there are enough."""
DEMO_MODEL_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
)


@dataclass(frozen=True)
class Question:
    """What is asked: the same for both runs."""

    pictures: Sequence[Image.Image]
    text: str
    max_tokens: int


@dataclass
class Measurement:
    """What the server reported while one answer was streaming."""

    block_size: int
    num_prompt_tokens: int = 0
    held_blocks: dict[int, int] = field(default_factory=dict)
    """Blocks held, by the number of answer tokens that were there at that time."""

    def nth_block(self, length: int) -> int | None:
        """Block being filled at a length; None too near to its borders to say."""
        block, filled = divmod(self.num_prompt_tokens + length, self.block_size)
        return block if 2 <= filled < self.block_size - 2 else None

    @property
    def usable(self) -> dict[int, int]:
        """`held_blocks` at the lengths that can be compared."""
        return {
            length: held
            for length, held in self.held_blocks.items()
            if self.nth_block(length) is not None
        }


def ask(server: Server, question: Question, *, avl: bool) -> Measurement:
    """Stream one answer to the terminal and sample the blocks held meanwhile.

    Raises:
        ServerError: the server was too busy to be sampled.
    """
    measured = Measurement(server.metrics().block_size)
    for attempt in range(ATTEMPTS):
        shown = question.max_tokens if attempt == 0 else 0
        _sample(server, question, measured, avl=avl, shown=shown)
        if len(measured.usable) >= ENOUGH:
            print("\n")
            return measured
    raise ServerError(
        f"too few looks at /metrics in {ATTEMPTS} answers: raise --max-tokens"
    )


def _sample(
    server: Server, question: Question, measured: Measurement, *, avl: bool, shown: int
) -> None:
    """Stream an answer, print its first `shown` chunks, and add to `measured`."""
    urls = [picture_url(picture) for picture in question.pictures]
    messages: list[Any] = [user_message(question.text, urls)]
    xargs = {} if avl else {"vllm_xargs": {"avl": 0}}
    before = settled_tokens(server)
    stream = server.client().chat.completions.create(
        model=server.model,
        messages=messages,
        # The answer goes on, unseen, until there are enough samples.
        max_tokens=4 * question.max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": EVERY_CHUNK, **xargs},
    )
    for number, chunk in enumerate(stream):
        if number < shown:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            measured.num_prompt_tokens = chunk.usage.prompt_tokens
        if number >= FIRST_SAMPLE:
            metrics = server.metrics()
            length = metrics.num_generated_tokens - before
            # The answer may have ended since its chunk was sent.
            if metrics.held_blocks > 0:
                measured.held_blocks[length] = metrics.held_blocks
        if number >= shown and len(measured.usable) >= ENOUGH:
            break
    stream.close()


def settled_tokens(server: Server) -> int:
    """Return the tokens generated so far, once an aborted answer adds no more."""
    tokens = -1
    while tokens != (now := server.metrics().num_generated_tokens):
        tokens = now
        time.sleep(0.5)
    return tokens


def compare(avl: Measurement, stock: Measurement) -> tuple[int, int, int]:
    """Return a length of the answer, and the blocks either run held at that length.

    The runs are sampled at other lengths: the nearest are taken, and the blocks that an
    answer grows by in between are added.
    """
    _, theirs, ours = min(
        (abs(ours - theirs), theirs, ours)
        for ours in avl.usable
        for theirs in stock.usable
    )
    grown = (stock.nth_block(theirs) or 0) - (stock.nth_block(ours) or 0)
    return theirs, avl.held_blocks[ours] + grown, stock.held_blocks[theirs]


def table(server: Server, avl: Measurement, stock: Measurement) -> str:
    """Lay the two measurements side by side."""
    metrics = server.metrics()
    pool, size = metrics.num_blocks, metrics.block_size
    length, kept, whole = compare(avl, stock)
    rows = (
        ("held by stock vLLM (avl: 0)", whole),
        ("kept with --attention-backend avl", kept),
        ("freed for other requests", whole - kept),
    )
    head = (
        f"KV cache after {stock.num_prompt_tokens} prompt and {length} answer tokens, "
        "from the server's /metrics"
    )
    lines = [head, f"{'':36}{'blocks':>8}{'tokens':>8}{'of the pool':>13}"]
    for name, blocks in rows:
        share = f"{blocks / pool:.1%}"
        lines.append(f"  {name:34}{blocks:>8}{blocks * size:>8}{share:>13}")
    return "\n".join(lines)


def how_to_ask(server: Server) -> str:
    """Return what to type to ask the running server."""
    return f"""\
The server listens on {server.url} (log: {server.log}). Ask it, from another terminal:

  from openai import OpenAI
  client = OpenAI(base_url="{server.url}/v1", api_key="none")
  print(client.chat.completions.create(
      model="{server.model}",
      messages=[{{"role": "user", "content": [
          {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}},
          {{"type": "text", "text": "{QUESTION}"}}]}}],
      extra_body={{"vllm_xargs": {{"avl_store_ratio": 0.3}}}},  # or {{"avl": 0}}: stock
  ).choices[0].message.content)

Ctrl-C stops it."""


def server_options(args: argparse.Namespace) -> list[str]:
    """Return the arguments of `vllm serve`."""
    options = ["--attention-backend", "avl"]
    settings = {"vision_store_ratio": args.store_ratio}
    options += json_option("--additional-config", {"avl": settings})
    options += json_option("--limit-mm-per-prompt", {"image": args.images})
    if args.model is None:
        options += DEMO_MODEL_OPTIONS
    if not args.serve:
        # A prefix hit would let the second run start where the first one ended.
        options.append("--no-enable-prefix-caching")
    return options


def demo(server: Server, args: argparse.Namespace) -> None:
    """Ask twice and compare."""
    pictures = [models.random_image(seed) for seed in range(args.images)]
    question = Question(pictures, QUESTION, args.max_tokens)
    print(f"{QUESTION} ({args.images} of them, store ratio {args.store_ratio})")
    print("\nadaptive attention:")
    avl = ask(server, question, avl=True)
    print("stock:")
    stock = ask(server, question, avl=False)
    print(table(server, avl, stock))


def leave_running(server: Server) -> None:
    """Keep the server in the foreground until Ctrl-C or its own end."""
    print(how_to_ask(server))
    code = server.process.wait()
    raise ServerError(f"vllm serve ended with exit status {code}; see {server.log}")


@contextmanager
def started(args: argparse.Namespace) -> Iterator[Server]:
    """Make the demo model where none is given, and serve it."""
    model = args.model
    if model is None:
        transformers.logging.disable_progress_bar()
        model = models.build("llava", CACHE / "demo-llava")
        print(GIBBERISH)
    log = CACHE / "demo-server.log"
    print(f"starting vllm serve {model} (log: {log})")
    with serve(
        model,
        server_options(args),
        log=log,
        port=args.port,
        timeout=args.timeout,
        environment=ONE_THREAD if args.model is None else {"HF_HUB_OFFLINE": "0"},
        report=print,
    ) as server:
        yield server


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_avl.testing.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--serve", action="store_true", help="leave the server running, ask nothing")
    add("--model", help="any vision-language model; default: one with random weights")
    add(
        "--store-ratio",
        type=float,
        default=parse_config({}).vision_store_ratio,
        metavar="RATIO",
        help="vision tokens whose KV cache stays stored, in (0, 1]; "
        "default: %(default)s",
    )
    add(
        "--images",
        type=int,
        default=2,
        help="pictures to ask about; default: %(default)s",
    )
    add(
        "--max-tokens",
        type=int,
        default=200,
        help="answer's length; default: %(default)s",
    )
    add("--port", type=int, help=f"default: {SERVE_PORT} with --serve, else a free one")
    add(
        "--timeout",
        type=float,
        default=600,
        help="seconds to start; default: %(default)s",
    )
    args = parser.parse_args(argv)
    check(parser, args)
    if args.serve and args.port is None:
        args.port = SERVE_PORT
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse bad values before a server is started for them."""
    if args.images < 1:
        parser.error(f"--images = {args.images}: must be at least 1")
    if args.max_tokens < SHORTEST_ANSWER:
        # The server may be done before the first look at its metrics.
        parser.error(
            f"--max-tokens = {args.max_tokens}: must be at least {SHORTEST_ANSWER}"
        )
    try:
        parse_config({"avl": {"vision_store_ratio": args.store_ratio}})
    except ValueError as error:
        parser.error(f"--store-ratio: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    args = parse(argv)
    # The default would end this process at once and leave the server behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with started(args) as server:
            leave_running(server) if args.serve else demo(server, args)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
