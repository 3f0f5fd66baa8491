"""Trains an EAGLE head for the bundled model, on its training questions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from benchmarks.testing.models import drafters
from benchmarks.training.evaluate import Question
from vllm_avl.bundled import WEIGHTS
from vllm_avl.bundled.samples import make_sample

TASKS = ("caption", "doc", "ocr", "vqa")
BATCH, LEARNING_RATE, STATE_WEIGHT = 8, 2e-3, 0.1


class Head(nn.Module):
    """One layer over the target's states and the tokens that they led to (EAGLE).

    arXiv 2401.15077: the state of a token and the embedding of the next one give the
    next state, which the target's own output layer reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = drafters.config_for(WEIGHTS)
        self.config._attn_implementation = "sdpa"
        width = self.config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([LlamaDecoderLayer(self.config, 0)])
        # vLLM's has none in front of the first layer.
        self.layers[0].input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(self.config)

    def forward(self, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] next states, of the next tokens and the states."""
        mixed = self.fc(torch.cat([embeddings, states], -1))
        positions = torch.arange(mixed.shape[1])[None]
        found = self.layers[0](mixed, position_embeddings=self.rotary(mixed, positions))
        return found[0] if isinstance(found, tuple) else found

    def save(self, out_dir: Path) -> Path:
        """Write it for vLLM; return the folder."""
        weights = {
            name: weight.contiguous() for name, weight in self.state_dict().items()
        }
        return drafters.save(self.config, weights, out_dir)


def train(seconds: float, out_dir: Path) -> Path:
    """Train a head for so long, and write it.

    Args:
        seconds: of training, by the clock.
        out_dir: to write.

    Returns:
        `out_dir`.
    """
    torch.manual_seed(0)
    target = LlavaForConditionalGeneration.from_pretrained(
        WEIGHTS, dtype=torch.float32
    ).eval()
    head = Head()
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE)
    start = time.monotonic()
    with tqdm(unit="step", disable=None) as progress:
        for inputs, answered in _batches():
            passed = time.monotonic() - start
            if passed > seconds:
                break
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - passed / seconds)
            loss = _loss(head, target, inputs, answered)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return head.save(out_dir)


def _loss(
    head: Head,
    target: LlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    answered: torch.Tensor,
) -> torch.Tensor:
    """Draft what the target says of the answers, and the states it says it from."""
    with torch.no_grad():
        states = target.model(**inputs).last_hidden_state
        embeddings = target.get_input_embeddings()(inputs["input_ids"])
        said = target.lm_head(states[:, 1:]).softmax(-1)
    drafted = head(embeddings[:, 1:], states[:, :-1])
    logits = target.lm_head(drafted)[answered]
    by_token = functional.cross_entropy(logits, said[answered])
    by_state = functional.smooth_l1_loss(drafted[answered], states[:, 1:][answered])
    return by_token + STATE_WEIGHT * by_state


def _batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yield the target's inputs, and [batch, tokens - 1] where the next is answered."""
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    tokenizer = processor.tokenizer
    for first in count(0, BATCH):
        texts, images, prompts = [], [], []
        for seed in range(first, first + BATCH):
            sample = make_sample(TASKS[seed % len(TASKS)], "train", seed)
            text, answer = sample.turns[-1]
            question = Question(sample.images(), text, [answer])
            prompt = question.request(tokenizer)["prompt"]
            prompts.append(len(tokenizer(prompt, add_special_tokens=False).input_ids))
            texts.append(f"{prompt} {answer}{tokenizer.eos_token}")
            images.append(question.images)
        inputs = processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
        # The prompt's one word for a picture stands for all of its tokens.
        per_image = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")
        begins = (
            torch.tensor(prompts)
            + per_image.sum(1)
            - torch.tensor([len(shown) for shown in images])
        )
        places = torch.arange(inputs["input_ids"].shape[1] - 1)
        answered = (places >= begins[:, None] - 1) & (
            inputs["attention_mask"][:, 1:] > 0
        )
        yield dict(inputs), answered
