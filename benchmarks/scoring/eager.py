"""The bundled model in eager code: prompts once, answers over any choice of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.training.evaluate import Question

NUM_QUERIES = 32
"""Last rows of a prompt whose queries are kept: the most that any policy scores by."""
Kept = Sequence[Sequence[torch.Tensor]]
"""[num_layers][num_prompts], each [num_heads, num_rows] positions that stay."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that has been computed; layers come first, then heads."""

    vision_ranges: list[tuple[int, int]]
    """Half-open ranges of the pictures' tokens."""
    keys: torch.Tensor
    """[num_layers, num_heads, num_tokens, head_size], rotated."""
    values: torch.Tensor
    queries: torch.Tensor
    """[num_layers, num_heads, NUM_QUERIES, head_size], of the last tokens."""
    first: int
    """The first token of the answer, which has seen all."""

    @property
    def num_tokens(self) -> int:
        """Length."""
        return self.keys.shape[2]

    def attention(self, layer: int, num_rows: int) -> torch.Tensor:
        """[num_heads, num_tokens] attention of the last rows, summed."""
        query, keys = self.queries[layer][:, -num_rows:], self.keys[layer]
        token = torch.arange(self.num_tokens)
        hidden = token > token[-num_rows:, None]
        return attention(query, keys, hidden).sum(1)


def attention(
    query: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Softmax of scaled products, but for `hidden` ones; dimensions as for matmul."""
    logits = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


class Model:
    """A LLaVA of LLaMA layers without grouped heads, as the bundled one is, in fp32."""

    def __init__(self, path: Path) -> None:
        self.processor = transformers.LlavaProcessor.from_pretrained(path)
        llava = transformers.LlavaForConditionalGeneration
        self.inside = llava.from_pretrained(path, dtype=torch.float32).eval()
        self.text: Any = self.inside.model.language_model
        config = self.inside.config
        self.image_id, self.eos = (
            config.image_token_index,
            config.text_config.eos_token_id,
        )

    @property
    def num_layers(self) -> int:
        """Of the language model."""
        return len(self.text.layers)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return self.processor.tokenizer

    @torch.no_grad()
    def prefill(self, question: Question) -> Prompt:
        """Compute a question's prompt."""
        request = question.request(self.tokenizer)
        inputs = self.processor(
            text=request["prompt"],
            images=question.images,
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids = inputs["input_ids"]
        states = self.text.embed_tokens(ids)
        is_vision = ids[0] == self.image_id
        seen = self.inside.model.get_image_features(pixel_values=inputs["pixel_values"])
        states[0, is_vision] = torch.cat(list(seen.pooler_output))
        rotation = self.text.rotary_emb(states, torch.arange(ids.shape[1])[None])
        found = []
        for layer in self.text.layers:
            query, key, value = self._project(layer, states, rotation)
            attended = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )
            states = self._finish(layer, states, attended)
            found.append((key[0], value[0], query[0, :, -NUM_QUERIES:]))
        keys, values, queries = (torch.stack(rows) for rows in zip(*found, strict=True))
        (first,) = self._next(states)
        edges = is_vision.int().diff(prepend=ids.new_zeros(1), append=ids.new_zeros(1))
        starts, ends = ((edges == edge).nonzero().flatten() for edge in (1, -1))
        ranges = list(zip(starts.tolist(), ends.tolist(), strict=True))
        return Prompt(ranges, keys, values, queries, int(first))

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], kept: Kept, max_tokens: int
    ) -> list[str]:
        """Answer greedily; step by step all prompts together.

        Args:
            prompts: computed.
            kept: what every step reads of them.
            max_tokens: of an answer.
        """
        caches = [
            _gather(prompts, layer, rows, max_tokens) for layer, rows in enumerate(kept)
        ]
        length = torch.tensor([prompt.num_tokens for prompt in prompts])
        tokens = torch.tensor([prompt.first for prompt in prompts])
        given, done = [tokens], tokens == self.eos
        for step in range(max_tokens - 1):
            if done.all():
                break
            states = self.text.embed_tokens(tokens.unsqueeze(1))
            rotation = self.text.rotary_emb(states, (length + step).unsqueeze(1))
            for layer, (keys, values, hidden) in zip(
                self.text.layers, caches, strict=True
            ):
                query, key, value = self._project(layer, states, rotation)
                end = hidden.shape[-1] - max_tokens + step + 1
                keys[:, :, end - 1], values[:, :, end - 1] = (
                    key[:, :, 0],
                    value[:, :, 0],
                )
                attended = attention(query, keys[:, :, :end], hidden[..., :end])
                states = self._finish(layer, states, attended @ values[:, :, :end])
            tokens = self._next(states).masked_fill(done, self.eos)
            done |= tokens == self.eos
            given.append(tokens)
        return [self._text(row) for row in torch.stack(given, 1).tolist()]

    def _project(
        self, layer: Any, states: torch.Tensor, rotation: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inside = layer.self_attn
        normal = layer.input_layernorm(states)
        query, key, value = (
            part(normal).unflatten(-1, (-1, inside.head_dim)).transpose(1, 2)
            for part in (inside.q_proj, inside.k_proj, inside.v_proj)
        )
        return *apply_rotary_pos_emb(query, key, *rotation), value

    def _finish(
        self, layer: Any, states: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        states = states + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def _next(self, states: torch.Tensor) -> torch.Tensor:
        return self.inside.lm_head(self.text.norm(states[:, -1])).argmax(-1)

    def _text(self, ids: list[int]) -> str:
        end = ids.index(self.eos) if self.eos in ids else len(ids)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def _gather(
    prompts: Sequence[Prompt], layer: int, rows: Sequence[torch.Tensor], room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and [num_prompts, 1, 1, num_slots] which slots nobody sees."""
    _, num_heads, _, head_size = prompts[0].keys.shape
    most = max(positions.shape[1] for positions in rows)
    keys = torch.zeros(len(prompts), num_heads, most + room, head_size)
    values = torch.zeros_like(keys)
    hidden = torch.zeros(len(prompts), 1, 1, most + room, dtype=torch.bool)
    for row, (prompt, positions) in enumerate(zip(prompts, rows, strict=True)):
        num_rows = positions.shape[1]
        index = positions.unsqueeze(2).expand(num_heads, -1, head_size)
        keys[row, :, :num_rows] = prompt.keys[layer].gather(1, index)
        values[row, :, :num_rows] = prompt.values[layer].gather(1, index)
        hidden[row, ..., num_rows:most] = True
    return keys, values, hidden
