"""Small drafters for the checkpoints of this package.

Nobody has trained them. EAGLE's pass the target's hidden state on, with something of
what their layer attends to, and draft what the target's output layer makes of it. A
draft model is the target without its tower: it sees no picture, and is right without. A
layer for multi-token prediction (MTP) is like EAGLE's, and lies in the target. Medusa's
heads see the target's state alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

QK_GAIN, ATTENTION_GAIN, MLP_GAIN, EMBEDDING_GAIN = 1.6, 0.5, 0.2, 0.3
AUXILIARY = (1, 2)
"""Layers of the target whose states EAGLE-3 sees."""


@torch.no_grad()
def build(method: str, target: Path, out_dir: Path, seed: int = 0) -> Path:
    """Writes a drafter of one layer.

    Args:
        method: vLLM's name: eagle or eagle3.
        target: the checkpoint that it drafts for.
        out_dir: to write.
        seed: of the weights.

    Returns:
        `out_dir`.
    """
    config = config_for(target)
    generator = torch.Generator().manual_seed(seed)
    weights = _layer(config, generator)
    mixed = EMBEDDING_GAIN * _normal(generator, config.hidden_size, config.hidden_size)
    weights["fc.weight"] = torch.cat([mixed, torch.eye(config.hidden_size)], 1)
    if method == "eagle":
        # It has no norm in front of its first layer.
        del weights["layers.0.input_layernorm.weight"]
    else:
        weights = _of_eagle3(weights, target, generator)
        config.architectures = ["LlamaForCausalLMEagle3"]
        config.eagle_config = {"eagle_aux_hidden_state_layer_ids": AUXILIARY}
    return save(config, weights, out_dir)


@torch.no_grad()
def build_model(target: Path, out_dir: Path, num_copies: int = 1) -> Path:
    """Writes a draft model: the language model of a LLaVA checkpoint.

    Args:
        target: the checkpoint that it drafts for.
        out_dir: to write.
        num_copies: of each KV head, which are as many heads in its cache.

    Returns:
        `out_dir`.
    """
    text = json.loads((target / "config.json").read_text())["text_config"]
    num_heads = text["num_key_value_heads"] * num_copies
    config = config_for(
        target,
        num_hidden_layers=text["num_hidden_layers"],
        num_key_value_heads=num_heads,
        rope_parameters=text["rope_parameters"],
    )
    weights = {}
    with safe_open(target / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith("language_model."):
                weight = file.get_tensor(name)
                if "k_proj" in name or "v_proj" in name:
                    heads = weight.unflatten(0, (-1, config.head_dim))
                    weight = heads.repeat_interleave(num_copies, 0).flatten(0, 1)
                weights[name.removeprefix("language_model.")] = weight
    return save(config, weights, out_dir)


@torch.no_grad()
def build_medusa(target: Path, out_dir: Path, num_heads: int, seed: int = 0) -> Path:
    """Writes Medusa heads: each draws a token of its own from the target's last state.

    Args:
        target: the checkpoint that they draft for.
        out_dir: to write.
        num_heads: tokens drafted in a step.
        seed: of the weights.

    Returns:
        `out_dir`.
    """
    text = json.loads((target / "config.json").read_text())["text_config"]
    size, generator = text["hidden_size"], torch.Generator().manual_seed(seed)
    with safe_open(target / "model.safetensors", "pt") as file:
        (name,) = (name for name in file.keys() if "lm_head" in name)  # noqa: SIM118
        lm_head = file.get_tensor(name)
    weights = {}
    for head in range(num_heads):
        mixed = EMBEDDING_GAIN * _normal(generator, size, size)
        weights[f"blocks.{head}.layers.0.weight"] = mixed
        weights[f"lm_heads.{head}.weight"] = lm_head.clone()
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": size,
        "vocab_size": text["vocab_size"],
        "num_heads": num_heads,
        "num_hidden_layers": 1,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    return out_dir


@torch.no_grad()
def add_mtp(target: Path, prefix: str, seed: int = 0) -> None:
    """Adds a layer to a checkpoint that predicts the token behind the next (MTP).

    Args:
        target: the checkpoint.
        prefix: of its layers' names.
        seed: of the weights.
    """
    path, generator = target / "model.safetensors", torch.Generator().manual_seed(seed)
    text = json.loads((target / "config.json").read_text())["text_config"]
    size, weights = text["hidden_size"], load_file(path)
    (head,) = (weight for name, weight in weights.items() if "lm_head" in name)
    added = _randomized(
        {
            name.removeprefix(f"{prefix}0."): weight
            for name, weight in weights.items()
            if name.startswith(f"{prefix}0.")
        },
        generator,
    )
    mixed = EMBEDDING_GAIN * _normal(generator, size, size)
    added["eh_proj.weight"] = torch.cat([mixed, torch.eye(size)], 1)
    added["shared_head.head.weight"] = head.clone()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        added[f"{norm}.weight"] = torch.ones(size)
    number = text["num_hidden_layers"]
    weights |= {f"{prefix}{number}.{name}": weight for name, weight in added.items()}
    save_file(weights, path, metadata={"format": "pt"})


def config_for(target: Path, **changes: Any) -> LlamaConfig:
    """Return the configuration of a drafter of one layer for a checkpoint."""
    text = json.loads((target / "config.json").read_text())["text_config"]
    fields = LlamaConfig().to_dict()
    known = {name: value for name, value in text.items() if name in fields}
    known |= {"num_hidden_layers": 1, "model_type": "llama", "rope_parameters": None}
    config = LlamaConfig(**(known | changes))
    config.architectures = ["LlamaForCausalLM"]
    return config


def save(config: LlamaConfig, weights: dict[str, torch.Tensor], out_dir: Path) -> Path:
    """Write a checkpoint that vLLM reads as a drafter; return its folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out_dir)
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    return out_dir


def _layer(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        name: weight
        for name, weight in LlamaModel(config).named_parameters()
        if name.startswith("layers.")
    }
    return _randomized(shapes, generator)


def _randomized(
    weights: Mapping[str, torch.Tensor], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Returns other matrices of the same shapes, and vectors as they are."""
    gains = {
        "q_proj": QK_GAIN,
        "k_proj": QK_GAIN,
        "o_proj": ATTENTION_GAIN,
        "down_proj": MLP_GAIN,
    }
    drawn = {}
    for name, weight in weights.items():
        if weight.dim() == 2:
            gain = gains.get(name.split(".")[-2], 1.0)
            weight = gain * _normal(generator, *weight.shape)
        drawn[name] = weight.clone()
    return drawn


def _of_eagle3(
    weights: dict[str, torch.Tensor], target: Path, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Its layer attends by token and state, and it has an output layer of its own."""
    weights = {name.replace("layers.0", "midlayer"): w for name, w in weights.items()}
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"midlayer.self_attn.{part}.weight"
        rows, columns = weights[name].shape
        weights[name] = QK_GAIN * _normal(generator, rows, 2 * columns)
    norm = weights["midlayer.input_layernorm.weight"]
    weights |= {
        "midlayer.hidden_norm.weight": norm.clone(),
        "norm.weight": norm.clone(),
    }
    with safe_open(target / "model.safetensors", "pt") as file:
        (head,) = (name for name in file.keys() if "lm_head" in name)  # noqa: SIM118
        weights["lm_head.weight"] = file.get_tensor(head)
    return weights


def _normal(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator) / columns**0.5
