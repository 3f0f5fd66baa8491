"""Asks a served model about pictures and shows how many KV blocks that held.

The blocks are read from the server's /metrics while the answer streams: once with
adaptive attention, once with `avl: 0` in the request, which is what stock vLLM does.
Then the page below /avl/ shows which patches were kept.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_avl.bundled import LIMITS, WEIGHTS
from vllm_avl.bundled.samples import DESCRIBE, make_sample
from vllm_avl.config import parse_config
from vllm_avl.demo.held_blocks import Question, ask, table
from vllm_avl.demo.server import (
    ONE_THREAD,
    Server,
    ServerError,
    json_option,
    serve,
)

CACHE = Path(".cache")
REMEMBERED = 8
FIRST_SCENE = 2
"""Of the held-out captions; the model describes this one without a fault."""
SERVE_PORT = 8000
SHORTEST_ANSWER = 100
DEMO_MODEL_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(128 << 20)),
)


def how_to_ask(server: Server) -> str:
    """Return what to type to ask the running server."""
    return f"""\
The server listens on {server.url} (log: {server.log}).
What it keeps and reads: {page(server)}
Ask it, from another terminal:

  from openai import OpenAI
  client = OpenAI(base_url="{server.url}/v1", api_key="none")
  print(client.chat.completions.create(
      model="{server.model}",
      messages=[{{"role": "user", "content": [
          {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}},
          {{"type": "text", "text": "{DESCRIBE}"}}]}}],
      extra_body={{"vllm_xargs": {{"avl_store_ratio": 0.3}}}},  # or {{"avl": 0}}: stock
  ).choices[0].message.content)

Ctrl-C stops it."""


def page(server: Server, request_id: str = "") -> str:
    """Return the address of the page, or of one request on it."""
    return f"{server.url}/avl/" + (f"#{request_id}" if request_id else "")


def show_on_page(server: Server, question: Question) -> str:
    """Ask once more, to the end of the answer; return where the page shows it."""
    completion = server.client().chat.completions.create(
        model=server.model,
        messages=question.messages,
        max_tokens=question.max_tokens,
        temperature=0,
    )
    return page(server, completion.id)


def show_answer(server: Server, question: Question, *, avl: bool) -> str:
    """Print an answer as it comes, and return it."""
    stream = server.client().chat.completions.create(
        model=server.model,
        messages=question.messages,
        max_tokens=question.max_tokens,
        temperature=0,
        stream=True,
        extra_body={} if avl else {"vllm_xargs": {"avl": 0}},
    )
    answer = ""
    for chunk in stream:
        for choice in chunk.choices:
            answer += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
    print("\n")
    return answer.strip()


def server_options(args: argparse.Namespace) -> list[str]:
    """Return the arguments of `vllm serve`."""
    options = ["--attention-backend", "avl"]
    settings = {
        "store_ratio": args.store_ratio,
        "core_ratio": args.core_ratio,
        "introspection": REMEMBERED,
        # The server listens to this machine only.
        "show_content": True,
    }
    options += json_option("--additional-config", {"avl": settings})
    options += json_option("--limit-mm-per-prompt", {"image": args.images})
    if args.model is None:
        options += DEMO_MODEL_OPTIONS
    if not args.serve:
        # A prefix hit would let the second run start where the first one ended.
        options.append("--no-enable-prefix-caching")
    return options


def demo(server: Server, args: argparse.Namespace) -> None:
    """Ask twice and compare, then say where to look."""
    seeds = range(FIRST_SCENE, FIRST_SCENE + args.images)
    scenes = [make_sample("caption", "test", seed) for seed in seeds]
    pictures = [picture for scene in scenes for picture in scene.images()]
    question = Question(pictures, DESCRIBE, args.max_tokens)
    print(f"{DESCRIBE} ({args.images} of them, store ratio {args.store_ratio})")
    for scene in scenes:
        print(f"\nwhat was drawn:\n{scene.references[0]}")
    print("\nadaptive attention:")
    answer = show_answer(server, question, avl=True)
    if [answer] == [scene.references[0] for scene in scenes]:
        print("(right, word for word)\n")
    print("stock:")
    show_answer(server, question, avl=False)
    print("measuring what either holds ...\n", flush=True)
    avl = ask(server, question, avl=True)
    stock = ask(server, question, avl=False)
    print(table(server, avl, stock))
    print(f"\nWhich patches were kept: {show_on_page(server, question)}")
    if args.wait:
        print("The server runs until Ctrl-C.", flush=True)
        wait(server)
    else:
        print("The server has stopped; --wait keeps it until Ctrl-C.")


def leave_running(server: Server) -> None:
    """Keep the server in the foreground until Ctrl-C or its own end."""
    print(how_to_ask(server))
    wait(server)


def wait(server: Server) -> None:
    """Wait for Ctrl-C, or for the server's own end."""
    code = server.process.wait()
    raise ServerError(f"vllm serve ended with exit status {code}; see {server.log}")


@contextmanager
def started(args: argparse.Namespace) -> Iterator[Server]:
    """Serve the demo model where none is given."""
    model = args.model
    if model is None:
        model = WEIGHTS
        print(LIMITS)
    log = CACHE / "demo-server.log"
    print(f"starting vllm serve {model} (log: {log})")
    with serve(
        model,
        server_options(args),
        log=log,
        port=args.port,
        timeout=args.timeout,
        environment={"VLLM_PLUGINS": "avl"}
        | (ONE_THREAD if args.model is None else {"HF_HUB_OFFLINE": "0"}),
        report=print,
    ) as server:
        yield server


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_avl.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--serve", action="store_true", help="leave the server running, ask nothing")
    add("--model", help="any vision-language model; default: the bundled one")
    add(
        "--store-ratio",
        type=float,
        default=parse_config({}).store_ratio,
        metavar="RATIO",
        help="vision tokens whose KV cache stays stored, in (0, 1]; "
        "default: %(default)s",
    )
    add(
        "--core-ratio",
        type=float,
        metavar="RATIO",
        help="vision tokens that ordinary steps read; default: all that are stored",
    )
    add(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=sys.stdin.isatty(),
        help="leave the server running behind the answers; default: in a terminal",
    )
    add(
        "--images",
        type=int,
        default=1,
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
        parse_config(
            {
                "avl": {
                    "store_ratio": args.store_ratio,
                    "core_ratio": args.core_ratio,
                }
            }
        )
    except ValueError as error:
        parser.error(f"--store-ratio, --core-ratio: {error}")


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
