"""Hugging Face's model as the measure of an answer over what was kept.

For what vLLM's CPU build has not: pictures seen in both directions, or fp32 beside
recurrent states.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.masking_utils import eager_mask

from benchmarks.testing import models
from standin.asks import BUDGET

STOCK = {"num_scoring": 1, "evicted": [[[]]]}
"""What is kept of a request that is not adapted."""


@dataclass
class Followed:
    """What Hugging Face's model says of an answer."""

    logprobs: list[float]
    scores: torch.Tensor
    """[num_prompt_tokens] attention in the layer with full attention."""
    is_vision: list[bool]


class Eager:
    """Hugging Face's model, whose answers do not see what was evicted."""

    def __init__(self, folder: Path, full_layer: int) -> None:
        """Load it.

        Args:
            folder: of the checkpoint.
            full_layer: the only one with full attention.
        """
        self.full_layer = full_layer
        self.evicted: list[list[int]] = []
        self.num_scoring = 1
        self.scores: torch.Tensor | None = None
        AttentionInterface.register("evicting", self._attend)
        AttentionMaskInterface.register("evicting", eager_mask)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder,
            attn_implementation={"text_config": "evicting", "vision_config": "eager"},
            dtype=torch.float32,
        ).eval()

    @torch.no_grad()
    def follow(
        self,
        request: dict[str, Any],
        tokens: list[int],
        evicted: list[list[int]],
        num_scoring: int,
    ) -> Followed:
        """Say how likely an answer's tokens are.

        Args:
            request: as `standin.generate` takes it.
            tokens: of its answer.
            evicted: positions of the prompt by KV head, or of all heads.
            num_scoring: of the prompt's rows, the last ones.
        """
        pictures = [
            models.random_image(seed, width=112, height=112)
            for seed in request["images"]
        ]
        text = models.image_prompt(request["family"], len(pictures), request["text"])
        inputs = self.processor(
            text=text, images=pictures, return_tensors="pt", add_special_tokens=False
        )
        ids = inputs["input_ids"][0]
        self.evicted, self.num_scoring, self.scores = [], num_scoring, None
        output = self.model(**inputs, use_cache=True)
        scores, self.evicted = self.scores, evicted
        logprobs = []
        for token in tokens:
            logprobs.append(output.logits[0, -1].log_softmax(-1)[token].item())
            output = self.model(
                input_ids=torch.tensor([[token]]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        is_vision = ids == self.model.config.image_token_id
        return Followed(logprobs, scores, is_vision.tolist())

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        group = query.shape[1] // key.shape[1]
        keys, values = (x[0].repeat_interleave(group, 0) for x in (key, value))
        logits = query[0] @ keys.transpose(1, 2) * scaling
        if mask is not None:
            logits = logits + mask[0, :, :, : keys.shape[1]]
        if module.layer_idx == self.full_layer:
            for head, positions in enumerate(self.evicted):
                first = head * group if len(self.evicted) > 1 else 0
                last = first + group if len(self.evicted) > 1 else None
                logits[first:last, :, positions] = -torch.inf
        attention = logits.softmax(-1)
        if module.layer_idx == self.full_layer and self.scores is None:
            self.scores = attention[:, -self.num_scoring :].sum((0, 1))
        return (attention @ values).transpose(0, 1).unsqueeze(0), None


def check_answer(
    eager: Eager,
    request: dict[str, Any],
    report: dict[str, Any],
    index: int,
    kept: dict[str, Any],
    block_size: int,
) -> None:
    """Assert that an answer, and what was evicted for it, are the eager model's.

    Args:
        eager: the model.
        request: as `standin.generate` takes it.
        report: its, with log-probabilities.
        index: of the request in the report.
        kept: of the request, as reported.
        block_size: of the layer with full attention.
    """
    (gone,) = kept["evicted"]
    said = eager.follow(request, report["tokens"][index], gone, kept["num_scoring"])
    assert report["logprobs"][index] == pytest.approx(said.logprobs, abs=BUDGET)
    num_behind = len(said.is_vision) - 1 - max(np.flatnonzero(said.is_vision))
    assert kept["num_scoring"] < num_behind
    if request["xargs"].get("avl_policy", "avl") == "avl" and gone[0]:
        check_choice(gone[0], said, block_size)


def check_choice(gone: list[int], said: Followed, block_size: int) -> None:
    """Assert that no vision token that is gone was attended to more than one kept."""
    assert all(said.is_vision[position] for position in gone)
    kept = [
        position
        for position in range(len(said.is_vision) // block_size * block_size)
        if said.is_vision[position] and position not in gone
    ]
    assert said.scores is not None
    assert said.scores[gone].max() <= said.scores[kept].min() * (1 + 1e-5)
