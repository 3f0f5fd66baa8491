"""Builds the random-weight model a benchmark serves, and knows what its cache costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.testing import models
from benchmarks.testing.models import ModelSize

VISION_TOKENS_PER_IMAGE = 576


@dataclass(frozen=True)
class Model:
    """A LLaVA-like checkpoint, served in `dtype`."""

    path: Path
    size: ModelSize
    dtype: str

    @property
    def layer_bytes_per_token(self) -> int:
        """Key and value of one token in one layer."""
        row = self.size.num_kv_heads * self.size.head_size
        return 2 * row * getattr(torch, self.dtype).itemsize

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.size.num_layers * self.layer_bytes_per_token

    def describe(self) -> str:
        """Return architecture, width, layers, query heads, KV heads x size, dtype."""
        size = self.size
        return (
            f"llava h{size.hidden_size} l{size.num_layers} q{size.num_heads} "
            f"kv{size.num_kv_heads}x{size.head_size} {self.dtype}"
        )


def build(folder: Path, size: ModelSize, dtype: str) -> Model:
    """Build the checkpoint, once for a folder and its sizes."""
    name = "-".join(map(str, asdict(size).values()))
    return Model(models.build("llava", folder / name, size), size, dtype)
