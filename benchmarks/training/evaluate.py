"""Scores a checkpoint on the held-out tasks through vLLM, with two controls."""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from benchmarks.training import metrics
from vllm_avl.bundled import WEIGHTS
from vllm_avl.bundled.samples import TASKS, Sample, make_sample

CONTROLS = ("full", "blind", "shuffled")
ALL_TASKS = (*TASKS, "two_turn")
MAX_IMAGES = 2


@dataclass(frozen=True)
class Question:
    """One request and what is right.

    Attributes:
        images: Its pictures.
        text: What is asked.
        truths: Right answers, the first one the exact one.
        earlier: A first turn about the same pictures, with its right answer.
    """

    images: list[Image.Image]
    text: str
    truths: list[str]
    earlier: tuple[tuple[str, str], ...] = ()

    def chat(self, pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns the turns of the chat.

        Args:
            pictures: The parts that stand for the images, in the first turn.
        """
        turns = []
        for text, given in self.earlier:
            turns += [_turn("user", text), _turn("assistant", given)]
        turns.append(_turn("user", self.text))
        turns[0]["content"] = [*pictures, *turns[0]["content"]]
        return turns

    def request(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Returns what `LLM.generate` takes, worded by a chat template."""
        text = tokenizer.apply_chat_template(
            self.chat([{"type": "image"} for _ in self.images]),
            tokenize=False,
            add_generation_prompt=True,
        )
        request: dict[str, Any] = {"prompt": text}
        if self.images:
            request["multi_modal_data"] = {"image": self.images}
        return request


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def questions(
    task: str, count: int, control: str = "full", first: int = 0
) -> list[Question]:
    """Returns `count` held-out questions of a task.

    Args:
        task: One of `ALL_TASKS`.
        count: How many.
        control: `blind` leaves the pictures out, `shuffled` gives each question the
            pictures of the next one.
        first: Number of the first question.

    Raises:
        ValueError: `task` or `control` is unknown.
    """
    if task not in ALL_TASKS:
        raise ValueError(f"task={task!r} must be one of {ALL_TASKS}")
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} must be one of {CONTROLS}")
    samples = [_sample(task, seed) for seed in range(first, first + count)]
    images = [[] if control == "blind" else sample.images() for sample in samples]
    if control == "shuffled":
        images = images[1:] + images[:1]
    asked = []
    for sample, shown in zip(samples, images, strict=True):
        text, answer = sample.turns[-1]
        truths = sample.references or [answer]
        asked.append(Question(shown, text, truths, tuple(sample.turns[:-1])))
    return asked


def _sample(task: str, seed: int) -> Sample:
    if task == "two_turn":
        return make_sample(("vqa", "doc", "ocr")[seed % 3], "test", seed, 2)
    return make_sample(task, "test", seed)


def scores(task: str, answers: Sequence[str], asked: Sequence[Question]) -> list[float]:
    """Returns each answer's score, 0 to 100 (CIDEr: 0 to 1000)."""
    if task == "caption":
        return metrics.cider(answers, [question.truths for question in asked])
    truths = [question.truths[0] for question in asked]
    if task == "doc":
        return metrics.anls(answers, truths)
    return metrics.exact_match(answers, truths)


def max_tokens(task: str) -> int:
    """Returns how long an answer may be."""
    return 112 if task == "caption" else 16


def answer(llm: Any, asked: Sequence[Question], task: str) -> list[str]:
    """Returns greedy answers from a `vllm.LLM`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens(task))
    tokenizer = llm.get_tokenizer()
    requests = [question.request(tokenizer) for question in asked]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


def make_engine(model: Path, avl: dict[str, Any] | None) -> Any:
    """Returns a `vllm.LLM` for a checkpoint, with `avl` settings or stock."""
    from vllm import LLM

    options: dict[str, Any] = {}
    if avl is not None:
        options["attention_backend"] = "avl"
        options["additional_config"] = {"avl": avl}
    return LLM(
        str(model),
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=32,
        kv_cache_memory_bytes=256 << 20,
        block_size=32,
        enforce_eager=True,
        limit_mm_per_prompt={"image": MAX_IMAGES},
        **options,
    )


def main() -> None:
    """Prints one row a task and control: task, control, questions, score."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.evaluate",
        description="Score a checkpoint on the held-out tasks through vLLM.",
    )
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=ALL_TASKS)
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=("full",))
    parser.add_argument("--count", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--avl",
        type=json.loads,
        help="""the plug-in's settings, as in '{"store_ratio": 0.5}'; """
        "vLLM's own attention without",
    )
    parser.add_argument("--out", type=Path, help="append the rows to this CSV")
    parser.add_argument("--show", type=int, default=0, help="answers to print a task")
    args = parser.parse_args()
    llm = make_engine(args.model, args.avl)
    for task in args.tasks:
        for control in args.controls:
            asked = questions(task, args.count, control)
            answers = answer(llm, asked, task)
            for question, given in list(zip(asked, answers, strict=True))[: args.show]:
                print(f"{question.text!r}: {given!r}, right: {question.truths[0]!r}")
            row = [
                task,
                control,
                args.count,
                round(fmean(scores(task, answers, asked)), 1),
            ]
            print(*row, sep="\t", flush=True)
            if args.out:
                with args.out.open("a", newline="") as file:
                    csv.writer(file).writerow([*row, json.dumps(args.avl)])


if __name__ == "__main__":
    main()
