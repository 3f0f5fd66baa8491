"""Trains a size of the bundled model: on CUDA where there is one, else on a CPU."""

import argparse
import csv
import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.training import prefetch, schedule
from benchmarks.training.batches import Batch, BatchMaker
from benchmarks.training.learner import (
    Learner,
    answer_loss,
    characters_read,
    exact_answers,
)
from benchmarks.training.optimizers import make_optimizers
from benchmarks.training.size import Size
from benchmarks.training.sizes import SIZES, tiny
from benchmarks.training.trained import load_trained, trained_state
from vllm_avl.bundled.samples import TASKS

MAX_NORM = 1.0
POINTING_WEIGHT = 0.5
SAVE_EVERY, CHECK_EVERY = 50, 300
CHECKED = 24
"""Held-out samples of each task in a check."""
MOST_WORKERS = 16
"""Processes that make batches for a GPU."""
CHECKPOINT, LOG, RENDEZVOUS = "state.pt", "log.csv", "rendezvous"
CPU = torch.device("cpu")


class Trainer:
    """The learner, its optimizers and the number of the next step.

    Everything else follows from that number, so a checkpoint is these three.
    """

    def __init__(
        self,
        out_dir: Path,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        size: Size | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.size = size or tiny()
        tokenizer, llava = self.size.make(seed)
        self.device = device
        self.out_dir = out_dir
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.step = 0
        self.seconds = 0.0
        self.batches = self._batch_maker(tokenizer, rank, num_ranks)
        self.learner = Learner(llava).to(device)
        self.optimizers = make_optimizers(self.learner, self.size.rates)
        if (out_dir / CHECKPOINT).exists():
            self._load()

    def _batch_maker(
        self, tokenizer: PreTrainedTokenizerFast, rank: int = 0, num_ranks: int = 1
    ) -> BatchMaker:
        size = self.size
        return BatchMaker(
            tokenizer, self.seed, rank, num_ranks, size.wording, size.points
        )

    def ahead(self, last: int, workers: int = 0) -> Iterator[Batch]:
        """Yields the batches of the steps up to `last`, made by `workers` processes."""
        steps = prefetch.Steps(self.batches, self.size.stages)
        return prefetch.batches(steps, self.step, last, workers)

    def train_step(self, batch: Batch | None = None) -> dict[str, float]:
        """Takes one step; returns its losses.

        Args:
            batch: Of this step; made here if not given.
        """
        stage, rate = schedule.stage_at(self.step, self.size.stages)
        if schedule.starts_answers(self.step, self.size.stages):
            # The same on every rank.
            batches = self._batch_maker(self.batches.tokenizer)
            first = batches.train(self.step, 64, stage.kept, text=False)
            self.learner.spread(first.to(self.device))
        batch = batch or next(self.ahead(self.step + 1))
        with self._half_precision():
            loss, shown = _losses(self.learner, batch.to(self.device), stage)
        loss.backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), MAX_NORM)
        for optimizer, highest in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = highest * rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return shown

    def _half_precision(self) -> torch.autocast:
        """Returns bfloat16 for what bears it, on a GPU; on a CPU all stays fp32."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind != CPU.type)

    def _share_gradients(self) -> None:
        """Averages the gradients over the ranks; all then take the same step."""
        if self.num_ranks == 1:
            return
        weights = [w for w in self.learner.parameters() if w.grad is not None]
        flat = torch.cat([w.grad.flatten() for w in weights])
        distributed.all_reduce(flat)
        flat /= self.num_ranks
        for weight, part in zip(
            weights, flat.split([w.numel() for w in weights]), strict=True
        ):
            weight.grad.copy_(part.view_as(weight))

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Returns the share of held-out answers that greedy decoding gets right.

        Each rank checks some of the tasks and returns those. While the tower learns
        alone, they are characters instead.
        """
        stage, _ = schedule.stage_at(self.step, self.size.stages)
        scores = {}
        for task in TASKS[self.rank :: self.num_ranks]:
            batch = self.batches.held_out(task, CHECKED, stage.kept).to(self.device)
            with self._half_precision():
                features = self.learner.look(batch)
                if stage.answers:
                    logits = self.learner.answer_logits(features, batch)
                    scores[task] = exact_answers(logits, batch).float().mean().item()
                else:
                    scores[task] = characters_read(self.learner, features, batch)
        return scores

    def save(self) -> None:
        """Writes the checkpoint; an interruption leaves the old one whole."""
        state = {
            "size": self.size.name,
            "step": self.step,
            "seed": self.seed,
            "seconds": self.seconds,
            "learner": trained_state(self.learner),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        path = self.out_dir / CHECKPOINT
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def _load(self) -> None:
        path = self.out_dir / CHECKPOINT
        state = torch.load(path, weights_only=True, map_location=self.device)
        asked = {"size": self.size.name, "seed": self.seed}
        # The first checkpoints were of one size and do not name it.
        for name, saved in {"size": "tiny", **state}.items():
            if name in asked and asked[name] != saved:
                raise ValueError(
                    f"{name}={asked[name]} must be {saved}, the {name} of the "
                    f"checkpoint in {self.out_dir}"
                )
        self.step, self.seconds = state["step"], state["seconds"]
        load_trained(self.learner, state["learner"])
        for (optimizer, _), saved in zip(
            self.optimizers, state["optimizers"], strict=True
        ):
            optimizer.load_state_dict(saved)

    def log(self, **values: float) -> None:
        """Appends a row to the log: step, CPU seconds, name, value."""
        with (self.out_dir / LOG).open("a", newline="") as file:
            for name, value in values.items():
                row = [self.step, round(self.seconds), name, round(value, 4)]
                csv.writer(file).writerow(row)


def _losses(
    learner: Learner, batch: Batch, stage: schedule.Stage
) -> tuple[torch.Tensor, dict[str, float]]:
    shown: dict[str, float] = {}
    loss = torch.zeros((), device=batch.text.device)
    features = torch.empty(0)
    if batch.keep.numel():
        with torch.set_grad_enabled(stage.label_weight > 0):
            features = learner.look(batch)
        if stage.label_weight:
            labels = learner.label_losses(features, batch)
            shown |= {name: value.item() for name, value in labels.items()}
            loss = loss + stage.label_weight * torch.stack(list(labels.values())).sum()
    if stage.answers:
        logits, pointing = learner.answer(features, batch)
        answers = answer_loss(logits, batch)
        name = "answers" if batch.keep.shape[1] == 1 else f"{batch.keep.shape[1]}images"
        shown[name] = answers.item()
        if batch.evidence.any():
            shown["pointing"] = pointing.item()
        loss = loss + answers + POINTING_WEIGHT * pointing
    return loss, shown


def run(trainer: Trainer, last: int, workers: int = 0) -> None:
    """Trains up to step `last`, with a progress bar; saves and checks on the way."""
    means: dict[str, list[float]] = {}
    ahead = trainer.ahead(last, workers)
    with tqdm(
        total=last,
        initial=trainer.step,
        unit="step",
        smoothing=0.05,
        disable=trainer.rank > 0,
    ) as bar:
        while trainer.step < last:
            started = time.process_time()
            for name, value in trainer.train_step(next(ahead)).items():
                means.setdefault(name, []).append(value)
            trainer.seconds += time.process_time() - started
            stage, _ = schedule.stage_at(trainer.step, trainer.size.stages)
            bar.set_description(stage.name, refresh=False)
            bar.update()
            if trainer.step % SAVE_EVERY == 0 or trainer.step == last:
                averages = {n: sum(v) / len(v) for n, v in means.items()}
                means.clear()
                if trainer.rank == 0:
                    trainer.save()
                    trainer.log(**averages)
                    bar.write(f"{trainer.step}: {_shown(averages)}")
            if trainer.step % CHECK_EVERY == 0 or trainer.step == last:
                scores = {f"held out {n}": v for n, v in trainer.check().items()}
                trainer.log(**scores)
                if scores:
                    bar.write(f"{trainer.step}: {_shown(scores)}")


def _shown(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items())


def _work(
    rank: int, num_ranks: int, args: argparse.Namespace, device: torch.device = CPU
) -> None:
    torch.set_num_threads(1)
    if num_ranks > 1:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{args.out.resolve() / RENDEZVOUS}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(days=1),
        )
    size = SIZES[args.size]()
    trainer = Trainer(args.out, args.seed, rank, num_ranks, size, device)
    workers = 0 if device == CPU else min(os.cpu_count() or 1, MOST_WORKERS)
    last = sum(stage.steps for stage in size.stages)
    run(trainer, last if args.steps is None else args.steps, workers)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.train",
        description="Train the bundled model; run again to resume.",
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and log")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda for small where there is a GPU, else cpu",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="on a CPU: one thread each; a busy machine stalls threads of one process "
        "more",
    )
    parser.add_argument("--steps", type=int, help="default: all of the schedule")
    return parser


def _default_device(size: Size) -> str:
    return "cuda" if size.wants_gpu and torch.cuda.is_available() else "cpu"


def main() -> None:
    """Trains from the last checkpoint, or from the start."""
    parser = _arguments()
    args = parser.parse_args()
    os.nice(19 - os.nice(0))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / RENDEZVOUS).unlink(missing_ok=True)
    device = torch.device(args.device or _default_device(SIZES[args.size]()))
    if device != CPU and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch.cuda sees")
    if device != CPU:
        _work(0, 1, args, device)
        return
    # Forked, so that every process carries the trainer's command line.
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(rank, args.processes, args))
        for rank in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        parser.exit(1, "training stopped: see the error above\n")


if __name__ == "__main__":
    main()
