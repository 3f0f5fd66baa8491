"""Speculative decoding beside adaptive attention: what is accepted, and what it brings.

Trains an EAGLE head for the bundled model (a minute and a half, once), then answers
questions with four engines in turn, stock and adaptive, each without and with the
head's drafts. The head's layer is adapted like the model's, so its drafts may be worse:
`accepted` is the part of the drafts that the model agrees with.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from tqdm import tqdm

from benchmarks import eagle_head
from benchmarks.harness import CHECKPOINTS, Benchmark, Report, main
from benchmarks.training.evaluate import ALL_TASKS, Question, max_tokens, questions
from vllm_avl.bundled import WEIGHTS

if TYPE_CHECKING:
    from benchmarks.testing.engine import Engine

SEATS = 8


@dataclass
class Tally:
    """What an engine has done for a task."""

    num_tokens: int = 0
    seconds: float = 0.0
    num_steps: int = 0
    """Of requests with drafts."""
    num_drafted: int = 0
    num_accepted: int = 0

    def add(self, drafts: Mapping[str, Sequence[int]], output: Any) -> None:
        """Add a step: drafts by request, and what the runner made of them."""
        for name, tokens in drafts.items():
            sampled = output.sampled_token_ids[output.req_id_to_index[name]]
            self.num_steps += 1
            self.num_drafted += len(tokens)
            self.num_accepted += len(sampled) - 1

    @property
    def tokens_per_second(self) -> float:
        """Of answers, the prompts' time included."""
        return self.num_tokens / self.seconds


def measure(args: argparse.Namespace, report: Report) -> None:
    """Train the head unless it is there, and say what was accepted."""
    head = args.checkpoints / f"eagle-head-{args.train_seconds:g}s"
    if not (head / "config.json").exists():
        eagle_head.train(args.train_seconds, head)
    rows = answer_all(args, head)
    facts = {"train_seconds": args.train_seconds}
    report.add("drafts", "Drafts of an EAGLE head", facts, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--tasks", nargs="+", choices=ALL_TASKS, default=["caption", "doc", "two_turn"])
    add("--count", type=int, default=96, help="questions of each task")
    add("--num-drafts", type=int, default=3, help="tokens drafted in a step")
    add("--train-seconds", type=float, default=90, help="of the head, once")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of trained heads")


def answer_all(args: argparse.Namespace, head: Path) -> list[dict[str, object]]:
    """Let every engine answer every task, round by round."""
    from benchmarks.testing.engine import Engine

    drafts = {
        "method": "eagle",
        "model": str(head),
        "num_speculative_tokens": args.num_drafts,
    }
    engines = {
        (name, drafting): Engine(
            WEIGHTS,
            avl=avl,
            speculative_config=drafts if drafting else None,
            max_model_len=2048,
            max_num_seqs=SEATS,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 2},
        )
        for name, avl in (("stock", None), ("avl", {}))
        for drafting in (False, True)
    }
    tallies = {(task, key): Tally() for task in args.tasks for key in engines}
    with tqdm(total=len(args.tasks) * args.count, disable=None) as progress:
        for task in args.tasks:
            for first in range(0, args.count, SEATS):
                asked = questions(task, min(SEATS, args.count - first), first=first)
                for key, engine in engines.items():
                    serve(engine, asked, task, tallies[task, key])
                progress.update(len(asked))
    for engine in engines.values():
        engine.shutdown()
    return [
        row(task, name, tallies) for task in args.tasks for name in ("stock", "avl")
    ]


def serve(engine: Engine, asked: Sequence[Question], task: str, tally: Tally) -> None:
    """Answer questions at once, and add up what came of it."""
    from vllm import SamplingParams

    tokenizer = engine.llm.get_tokenizer()
    params = SamplingParams(temperature=0, max_tokens=max_tokens(task))
    requests: list[Any] = [question.request(tokenizer) for question in asked]
    original = engine.scheduler.update_from_output

    def counted(scheduled: Any, output: Any) -> Any:
        tally.add(scheduled.scheduled_spec_decode_tokens, output)
        return original(scheduled, output)

    engine.scheduler.update_from_output = counted  # type: ignore[method-assign]
    start = time.perf_counter()
    outputs = engine.llm.generate(requests, params, use_tqdm=False)
    tally.seconds += time.perf_counter() - start
    tally.num_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    engine.scheduler.update_from_output = original  # type: ignore[method-assign]


def row(
    task: str, name: str, tallies: Mapping[tuple[str, tuple[str, bool]], Tally]
) -> dict[str, object]:
    """Return a line of the table."""
    plain, drafted = (tallies[task, (name, drafting)] for drafting in (False, True))
    return {
        "task": task,
        "name": name,
        "drafted": drafted.num_drafted,
        "accepted": round(drafted.num_accepted / drafted.num_drafted, 4),
        "tokens a step": round(1 + drafted.num_accepted / drafted.num_steps, 3),
        "tokens/s": round(plain.tokens_per_second, 1),
        "tokens/s, drafts": round(drafted.tokens_per_second, 1),
    }


QUICK = {"tasks": ["caption"], "count": SEATS, "train_seconds": 2}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK})

if __name__ == "__main__":
    main(BENCHMARK)
