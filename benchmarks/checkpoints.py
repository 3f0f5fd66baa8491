"""Builds the random-weight model the benchmarks serve, shaped so that serving is real.

A prompt costs a CPU far more than a GPU, relative to a decode step: the sum over 2,300
prompt tokens is bound by arithmetic, a decode step by reading the weights. The output
layer is read by every decode step and by one row of a prompt, so a vocabulary of the
size that Qwen's models have makes decoding weigh what it weighs on real servers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_avl.testing import models
from vllm_avl.testing.models import ModelSize

VISION_TOKENS_PER_IMAGE = 576
BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class Model:
    """A checkpoint and the sizes that the cache pool is computed from."""

    path: Path
    size: ModelSize
    vocab_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, fp32."""
        row = self.size.num_kv_heads * self.size.head_size
        return 2 * self.size.num_layers * row * BYTES_PER_FLOAT

    @property
    def kv_bytes_per_token_and_layer(self) -> int:
        """Keys and values of one layer, fp32."""
        return self.kv_bytes_per_token // self.size.num_layers

    def describe(self) -> str:
        """Return the shape in a few words."""
        size = self.size
        return (
            f"llava h{size.hidden_size} l{size.num_layers} "
            f"q{size.num_heads} kv{size.num_kv_heads}x{size.head_size} "
            f"v{self.vocab_size} fp32"
        )


def build(folder: Path, size: ModelSize, vocab_size: int) -> Model:
    """Build the LLaVA-like checkpoint once a folder, and widen its vocabulary.

    Args:
        folder: where checkpoints are kept between runs.
        size: sizes of the language model and the image tower.
        vocab_size: rows of the embedding and of the output layer; the added ones are
            zero and never win.
    """
    name = "-".join(str(value) for value in (*asdict(size).values(), vocab_size))
    path = folder / name
    models.build("llava", path, size)
    done = path / "widened"
    if not done.exists():
        _widen(path, vocab_size)
        done.touch()
    return Model(path, size, vocab_size)


def _widen(path: Path, vocab_size: int) -> None:
    """Pad the embedding and the output layer to `vocab_size` rows."""
    file = path / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            missing = max(vocab_size - len(weight), 0)
            zeros = weight.new_zeros(missing, weight.shape[1])
            weights[name] = torch.cat([weight, zeros])
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = vocab_size
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
