"""LoRA adapters with random weights, for the checkpoints of the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText


def make_adapter(checkpoint: Path, path: Path, seed: int) -> None:
    """Write an adapter of the language model's attention to `path`."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    config = LoraConfig(
        r=8,
        lora_alpha=64,
        target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj)",
        init_lora_weights=False,
    )
    torch.manual_seed(seed)
    get_peft_model(model, config).save_pretrained(path)
