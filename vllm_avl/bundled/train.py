"""Trains the bundled model from scratch, on a CPU."""

import argparse
import csv
import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm

from vllm_avl.bundled import schedule
from vllm_avl.bundled.architecture import make_config, make_model
from vllm_avl.bundled.batches import Batch, BatchMaker
from vllm_avl.bundled.learner import (
    Learner,
    answer_loss,
    characters_read,
    exact_answers,
)
from vllm_avl.bundled.samples import TASKS
from vllm_avl.bundled.tokens import make_tokenizer

MATRIX_RATE, OTHER_RATE = 4e-3, 3e-3
WEIGHT_DECAY = 0.02
MAX_NORM = 1.0
POINTING_WEIGHT = 0.5
SAVE_EVERY, CHECK_EVERY = 50, 300
CHECKED = 24
"""Held-out samples of each task in a check."""
CHECKPOINT, LOG, RENDEZVOUS = "state.pt", "log.csv", "rendezvous"


class Trainer:
    """The learner, its optimizers and the number of the next step.

    Everything else follows from that number, so a checkpoint is these three.
    """

    def __init__(
        self, out_dir: Path, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> None:
        tokenizer = make_tokenizer()
        self.out_dir = out_dir
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.step = 0
        self.seconds = 0.0
        self.batches = BatchMaker(tokenizer, seed, rank, num_ranks)
        self.learner = Learner(make_model(make_config(tokenizer), seed))
        self.optimizers = _optimizers(self.learner)
        if (out_dir / CHECKPOINT).exists():
            self._load()

    def train_step(self) -> dict[str, float]:
        """Takes one step; returns its losses."""
        stage, rate = schedule.stage_at(self.step)
        if schedule.starts_answers(self.step):
            # The same on every rank.
            batches = BatchMaker(self.batches.tokenizer, self.seed)
            self.learner.spread(batches.train(self.step, 64, stage.kept, text=False))
        batch = self.batches.train(self.step, stage.rows, stage.kept, stage.answers)
        loss, shown = _losses(self.learner, batch, stage)
        loss.backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), MAX_NORM)
        for optimizer, highest in zip(
            self.optimizers, (MATRIX_RATE, OTHER_RATE), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = highest * rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return shown

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
        stage, _ = schedule.stage_at(self.step)
        scores = {}
        for task in TASKS[self.rank :: self.num_ranks]:
            batch = self.batches.held_out(task, CHECKED, stage.kept)
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
            "step": self.step,
            "seed": self.seed,
            "seconds": self.seconds,
            "learner": self.learner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        path = self.out_dir / CHECKPOINT
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def _load(self) -> None:
        state = torch.load(self.out_dir / CHECKPOINT, weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(
                f"seed={self.seed} must be {state['seed']}, the seed of the checkpoint "
                f"in {self.out_dir}"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.learner.load_state_dict(state["learner"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
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
    loss = torch.zeros(())
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


def _optimizers(learner: Learner) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for everything else."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in learner.named_parameters():
        is_matrix = weight.dim() == 2 and ".layers." in name
        (matrices if is_matrix else others).append(weight)
    return [
        torch.optim.Muon(
            matrices,
            lr=MATRIX_RATE,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def run(trainer: Trainer, last: int) -> None:
    """Trains up to step `last`, with a progress bar; saves and checks on the way."""
    means: dict[str, list[float]] = {}
    with tqdm(
        total=last,
        initial=trainer.step,
        unit="step",
        smoothing=0.05,
        disable=trainer.rank > 0,
    ) as bar:
        while trainer.step < last:
            started = time.process_time()
            for name, value in trainer.train_step().items():
                means.setdefault(name, []).append(value)
            trainer.seconds += time.process_time() - started
            stage, _ = schedule.stage_at(trainer.step)
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


def _work(rank: int, num_ranks: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if num_ranks > 1:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{args.out.resolve() / RENDEZVOUS}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(days=1),
        )
    run(Trainer(args.out, args.seed, rank, num_ranks), args.steps)


def main() -> None:
    """Trains from the last checkpoint, or from the start."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_avl.bundled.train",
        description="Train the bundled model from scratch; run again to resume.",
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and log")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="one thread each; a busy machine stalls threads of one process more",
    )
    parser.add_argument(
        "--steps", type=int, default=schedule.TOTAL, help="default: %(default)s"
    )
    args = parser.parse_args()
    os.nice(19 - os.nice(0))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / RENDEZVOUS).unlink(missing_ok=True)
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
