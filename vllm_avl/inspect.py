"""Asks a model about a picture and draws which of its patches stay in the KV cache.

    python -m vllm_avl.inspect photo.jpg "What is in the picture?" --model MODEL

Without --model it asks the bundled model, which knows drawn scenes only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_avl import plot
from vllm_avl.config import parse_config
from vllm_avl.pictures import as_seen

DEFAULTS = parse_config({})
LENGTH = 64
# One process, which says only what is wrong.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
OPTIONS = {
    "store_ratio": "--store-ratio",
    "core_ratio": "--core-ratio",
    "refresh_interval": "--refresh-interval",
    "policy": "--policy",
}


class InspectError(RuntimeError):
    """There is nothing to draw; says why."""


def ask(args: argparse.Namespace, picture: Image.Image) -> tuple[str, Any, Any]:
    """Run the engine once.

    Returns:
        The answer, the first rank's report, and the model's configuration.

    Raises:
        InspectError: the request was served as stock.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = _demo_options() if args.model is None else {"model": args.model}
    # Not at module level: --help and bad arguments need no engine.
    from vllm import LLM, SamplingParams

    llm = LLM(
        **options,
        attention_backend="avl",
        additional_config={"avl": _settings(args)},
        limit_mm_per_prompt={"image": 1},
        max_model_len=args.max_model_len,
    )
    content = [
        {"type": "image_pil", "image_pil": picture},
        {"type": "text", "text": args.question},
    ]
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
    (output,) = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
    ids = llm.collective_rpc("avl_requests")[0]
    if not ids:
        raise InspectError(
            f"the request's {len(output.prompt_token_ids)} prompt tokens left nothing "
            "to free in whole blocks, so it was served exactly as stock: take a larger "
            "picture or a smaller --store-ratio"
        )
    report = llm.collective_rpc("avl_report", args=(ids[-1],))[0]
    return output.outputs[0].text, report, llm.llm_engine.model_config.hf_config


def _demo_options() -> dict[str, Any]:
    """Return the demo's model, as small as it serves."""
    from vllm_avl.bundled import LIMITS, WEIGHTS
    from vllm_avl.demo.server import ONE_THREAD

    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)
    print(LIMITS)
    return {
        "model": str(WEIGHTS),
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 128 << 20,
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, _destination(OPTIONS[name])) for name in OPTIONS}
    told = {name: value for name, value in given.items() if value is not None}
    return told | {"introspection": 1}


def _destination(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def table(report: Any, layers: Sequence[int]) -> str:
    """Say in numbers what the drawing shows."""
    lines = [f"{'layer':>5}" + "".join(f"{s.value:>13}" for s in plot.State)]
    for layer in layers:
        found = plot.counts(report, layer=layer)
        lines.append(f"{layer + 1:>5}" + "".join(f"{n:>13}" for n in found.values()))
    held, freed = (_field(report, f"num_blocks_{name}") for name in ("held", "freed"))
    lines.append(f"{held} KV blocks held, {freed} given back; stock: {held + freed}")
    return "\n".join(lines)


def _field(report: Any, name: str) -> Any:
    """A report is a dict if the engine has a process of its own."""
    return report[name] if isinstance(report, dict) else getattr(report, name)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_avl.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="a picture file")
    add("question", metavar="QUESTION", help="what to ask about it")
    add("--model", help="any vision-language model; default: the demo's")
    add("--layer", type=int, metavar="L", help="draw layer L, from 1; default: four")
    add(
        "--output",
        type=Path,
        default=Path("inspect.png"),
        metavar="PNG",
        help="file to write; default: %(default)s",
    )
    add(
        "--store-ratio",
        type=float,
        metavar="S",
        help=f"vision tokens stored; default: {DEFAULTS.store_ratio}",
    )
    add(
        "--core-ratio",
        type=float,
        metavar="C",
        help="vision tokens that ordinary steps read; default: all that are stored",
    )
    add(
        "--refresh-interval",
        type=int,
        metavar="K",
        help=f"steps between refreshes; default: {DEFAULTS.refresh_interval}",
    )
    add("--policy", help=f"the rule that ranks; default: {DEFAULTS.policy}")
    add("--max-tokens", type=int, default=LENGTH, help="default: %(default)s")
    add("--max-model-len", type=int, help="as for vLLM; default: the model's")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse bad values before an engine is started for them."""
    try:
        parse_config({"avl": _settings(args)})
    except ValueError as error:
        parser.error(_as_options(str(error)))
    if args.max_tokens < 2:
        # With one token nothing would be read again: it is served as stock.
        parser.error(f"--max-tokens = {args.max_tokens}: must be at least 2")
    if args.layer is not None and args.layer < 1:
        parser.error(f"--layer = {args.layer}: must be at least 1")
    if not args.output.parent.is_dir():
        parser.error(f"--output: {args.output.parent} is not a folder")


def _as_options(fault: str) -> str:
    """Name the option where the configuration names its field."""
    for field, option in OPTIONS.items():
        fault = fault.replace(f"additional_config.avl.{field}", option)
    return fault


def draw(args: argparse.Namespace) -> None:
    """Ask, print the answer and the counts, and write the drawing.

    Raises:
        InspectError: there is nothing to draw.
    """
    try:
        picture = as_seen(Image.open(args.image))
    except (OSError, Image.DecompressionBombError) as error:
        raise InspectError(f"{args.image}: {error}") from error
    answer, report, hf_config = ask(args, picture)
    size = plot.num_layers(report)
    if args.layer is not None and args.layer > size:
        raise InspectError(f"--layer = {args.layer}: the model has {size} layers")
    layers = plot.spread(size) if args.layer is None else [args.layer - 1]
    plot.sheet(report, picture, layers=layers, hf_config=hf_config).save(args.output)
    print(f"\n{args.question}\n{answer}\n\n{table(report, layers)}\n{args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    try:
        draw(args)
    except InspectError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
