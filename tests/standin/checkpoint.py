"""Models small enough for interpreted kernels, of few tokens for each picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import transformers

from benchmarks.testing.models import ModelSize, architectures, gemma, llama, qwen
from benchmarks.testing.models.tokens import make_tokenizer
from benchmarks.testing.models.weights import restore_clip_names, save

IMAGE_SIZE = 84
NUM_VISION_TOKENS = (IMAGE_SIZE // architectures.PATCH_SIZE) ** 2
SIZE = ModelSize(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    intermediate_size=128,
    max_position_embeddings=1024,
    vision_hidden_size=32,
    vision_num_layers=2,
    vision_num_heads=2,
    vision_intermediate_size=64,
)


def build_gemma3(out_dir: Path, seed: int = 0) -> Path:
    """Write a Gemma 3, two layers of three with sliding windows; return `out_dir`."""
    size = replace(SIZE, num_layers=3)
    gemma.gemma3(out_dir, size, seed, image_size=112, num_image_tokens=64)
    return out_dir


def build_gemma4(out_dir: Path, seed: int = 0) -> Path:
    """Write a Gemma 4 whose pictures are seen in both directions; return `out_dir`."""
    size = replace(SIZE, num_layers=3)
    both = {"use_bidirectional_attention": "vision"}
    gemma.gemma4(out_dir, size, seed, num_image_tokens=70, **both)
    return out_dir


def build_llama4(out_dir: Path, seed: int = 0) -> Path:
    """Write a Llama 4, two layers of three see chunks of 96; return `out_dir`.

    vLLM's experts want compiled operators that the CPU build has not.
    """
    llama.llama4(out_dir, replace(SIZE, num_layers=3), seed, has_experts=False)
    return out_dir


def build_qwen3_5(out_dir: Path, seed: int = 0) -> Path:
    """Write a Qwen3.5, two layers of three with recurrent states; return `out_dir`."""
    size = replace(SIZE, num_layers=3)
    states = {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    qwen.qwen3_5(out_dir, size, seed, least=64, **states)
    return out_dir


def build(out_dir: Path, seed: int = 0) -> Path:
    """Write the checkpoint to `out_dir` and return it."""
    tokenizer = make_tokenizer("llava", ["<image>"])
    text = architectures.text_settings(SIZE, tokenizer)
    config = transformers.LlavaConfig(
        vision_config=architectures._clip_config(SIZE, IMAGE_SIZE),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_VISION_TOKENS,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=tokenizer,
        patch_size=architectures.PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
    restore_clip_names(out_dir)
    return out_dir
