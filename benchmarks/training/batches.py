"""Training batches, made from a step's number alone."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.training.architecture import IMAGE_MEAN, IMAGE_STD
from benchmarks.training.evidence import conditions, is_spelled
from vllm_avl.bundled.picture import LABELS, NUM_PATCHES, Picture
from vllm_avl.bundled.samples import Sample, make_sample
from vllm_avl.bundled.tokens import WORDING
from vllm_avl.bundled.wording import Wording

SHARES = {"caption": 0.22, "vqa": 0.28, "doc": 0.28, "ocr": 0.22}
"""What a batch of one picture each is made of."""
MULTI_EVERY, BLIND_EVERY = 7, 14
NUM_TURNS = 7
MAX_TEXT = 112
IGNORED = -100


@dataclass
class Batch:
    """One batch.

    Attributes:
        pixels: [batch, images, 3, SIZE, SIZE], normalised.
        keep: [batch, images, kept], sorted patch numbers that go through the model.
        labels: [batch, images, kept] of classes for each key of `LABELS`.
        prefix: [tokens] in front of the questions, `<image>` once an image.
        text: [batch, length] token ids of the turns, padded.
        targets: [batch, length], the next token where an answer is due, else IGNORED.
        evidence: [batch, length, kept], the patches of the only image that the next
            token is read off; nowhere where no one place answers.
        tasks: The task of each row.
    """

    pixels: torch.Tensor
    keep: torch.Tensor
    labels: dict[str, torch.Tensor]
    prefix: torch.Tensor
    text: torch.Tensor
    targets: torch.Tensor
    evidence: torch.Tensor
    tasks: list[str]

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with its tensors on a device."""
        moved: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        labels = {name: value.to(device) for name, value in self.labels.items()}
        return replace(self, labels=labels, **moved)


class BatchMaker:
    """Makes the batch of a step, the same for a seed on every machine."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        wording: Wording = WORDING,
        points: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.wording = wording
        self.points = points

    def train(self, step: int, size: int, kept: int, text: bool = True) -> Batch:
        """Returns this rank's rows of batch number `step` of the training split.

        Args:
            step: The batch's number.
            size: Rows.
            kept: Patches of each picture: those with something on them, then others.
            text: False makes pictures of all tasks alike, for the tower alone.
        """
        rng = np.random.default_rng([self.seed, step])
        multi = text and step % MULTI_EVERY == MULTI_EVERY - 1
        blind = text and step % BLIND_EVERY == BLIND_EVERY // 2
        shares = {"multi": 1.0} if multi else SHARES
        tasks = rng.choice(list(shares), size, p=list(shares.values())).tolist()
        first = (self.seed * 1_000_003 + step) * 1024
        samples = [
            make_sample(task, "train", first + row, NUM_TURNS)
            for row, task in enumerate(tasks)
            if row % self.num_ranks == self.rank
        ]
        for sample in samples:
            # A caption in front of every question would be read instead of the picture.
            order = rng.permutation(len(sample.turns))
            sample.turns = [sample.turns[i] for i in order]
        if blind:
            for sample in samples:
                sample.pictures = []
        return self._batch(samples, rng, kept if not multi else kept * 9 // 16)

    def held_out(self, task: str, count: int, kept: int = NUM_PATCHES) -> Batch:
        """Returns the first `count` held-out samples of a task, one turn each."""
        samples = [make_sample(task, "test", seed) for seed in range(count)]
        return self._batch(samples, np.random.default_rng(0), kept)

    def _batch(
        self, samples: list[Sample], rng: np.random.Generator, kept: int
    ) -> Batch:
        pictures = [picture for sample in samples for picture in sample.pictures]
        num_images = len(samples[0].pictures)
        shape = (len(samples), num_images)
        keep = [_kept(picture, rng, kept) for picture in pictures]
        text, targets, asked = self._texts(samples)
        labels = {
            name: _stack(
                [
                    picture.labels[name].reshape(-1)[kept_here]
                    for picture, kept_here in zip(pictures, keep, strict=True)
                ],
                (*shape, kept),
            )
            for name in LABELS
        }
        return Batch(
            _pixels(pictures, shape),
            _stack(keep, (*shape, kept)),
            labels,
            torch.tensor(self._ids(self.wording.prefix(num_images))),
            text,
            targets,
            _evidence(labels, asked if self.points else [], text.shape),
            [sample.task for sample in samples],
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _texts(
        self, samples: list[Sample]
    ) -> tuple[torch.Tensor, torch.Tensor, list["Asked"]]:
        rows = [self._turns(sample) for sample in samples]
        length = max(len(ids) for ids, _, _ in rows)
        text = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        targets = torch.full((len(rows), length), IGNORED)
        for row, (ids, due, _) in enumerate(rows):
            text[row, : len(ids)] = torch.tensor(ids)
            targets[row, : len(due)] = torch.tensor(due)
        return text, targets, [asked for _, _, asked in rows]

    def _turns(self, sample: Sample) -> tuple[list[int], list[int], "Asked"]:
        """Returns the token ids of as many turns as fit, what to predict, and where.

        The last is the question of each answer, with the places that predict it.
        """
        ids: list[int] = []
        due: list[int] = []
        places: Asked = []
        for question, answer in sample.turns:
            opening = self.wording.again if ids else ""
            asked = self._ids(opening + self.wording.question.format(question))
            answered = self._ids(self.wording.answer.format(answer))
            if ids and len(ids) + len(asked) + len(answered) > MAX_TEXT:
                continue
            start = len(ids) + len(asked) - 1
            places.append((question, range(start, start + len(answered) - 1)))
            ids += asked + answered
            due += [IGNORED] * (len(asked) - 1) + answered + [IGNORED]
        return ids, due, places


Asked = list[tuple[str, range]]


def _evidence(
    labels: dict[str, torch.Tensor], asked: list[Asked], shape: torch.Size
) -> torch.Tensor:
    _, num_images, kept = labels["index"].shape
    evidence = torch.zeros(*shape, kept, dtype=torch.bool)
    if num_images != 1:
        return evidence
    for row, questions in enumerate(asked):
        for question, places in questions:
            wanted = conditions(question)
            spelled = is_spelled(question)
            if not wanted and not spelled:
                continue
            there = torch.ones(kept, dtype=torch.bool)
            for name, value in wanted.items():
                there &= labels[name][row, 0] == value
            for number, place in enumerate(places):
                at = labels["index"][row, 0] == number + 1 if spelled else True
                evidence[row, place] = there & at
    return evidence


def split_prefix(ids: torch.Tensor, image_id: int) -> list[torch.Tensor]:
    """Returns the tokens before, between and behind the images."""
    places = (ids == image_id).nonzero().flatten().tolist()
    starts = [0, *(place + 1 for place in places)]
    return [ids[a:b] for a, b in zip(starts, [*places, len(ids)], strict=True)]


def _kept(picture: Picture, rng: np.random.Generator, kept: int) -> np.ndarray:
    """Chooses patches: with something on them first, then background at random."""
    order = rng.random(NUM_PATCHES) - picture.shown.reshape(-1)
    return np.sort(np.argsort(order)[:kept])


def _pixels(pictures: list[Picture], shape: tuple[int, int]) -> torch.Tensor:
    if not pictures:
        return torch.empty(*shape, 3, 0, 0)
    images = np.stack([np.asarray(picture.image()) for picture in pictures])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((pixels - IMAGE_MEAN) / IMAGE_STD).unflatten(0, shape)


def _stack(arrays: list[np.ndarray], shape: tuple[int, ...]) -> torch.Tensor:
    if not arrays:
        return torch.empty(*shape[:-1], 0, dtype=torch.long)
    return torch.from_numpy(np.stack(arrays)).reshape(shape)
