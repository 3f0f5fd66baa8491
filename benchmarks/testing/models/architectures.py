"""One function per architecture: a small model with its processor."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from benchmarks.testing.models.size import ModelSize
from benchmarks.testing.models.tokens import make_tokenizer
from benchmarks.testing.models.weights import restore_clip_names, save

PATCH_SIZE = 14


def llava(out_dir: Path, size: ModelSize, seed: int) -> None:
    """LLaVA-1.5: 576 vision tokens for every image."""
    config, processor = llava_parts(size, make_tokenizer("llava", ["<image>"]))
    model = transformers.LlavaForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
    restore_clip_names(out_dir)


def llava_parts(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast
) -> tuple[transformers.LlavaConfig, transformers.LlavaProcessor]:
    """Returns what describes a LLaVA-1.5 without its weights."""
    image_size = 336
    config = transformers.LlavaConfig(**_llava_settings(size, tokenizer, image_size))
    images = transformers.CLIPImageProcessor(**_square(image_size))
    processor = transformers.LlavaProcessor(
        image_processor=images, **_processor_settings(tokenizer)
    )
    return config, processor


def llava_next(out_dir: Path, size: ModelSize, seed: int) -> None:
    """LLaVA-NeXT: 64 tokens for the whole image, and 64 at most for each of 4 tiles."""
    tokenizer = make_tokenizer("llava_next", ["<image>"])
    config, processor = llava_next_parts(size, tokenizer, tile=112)
    model = transformers.LlavaNextForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
    restore_clip_names(out_dir)


def llava_next_parts(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast, tile: int
) -> tuple[transformers.LlavaNextConfig, transformers.LlavaNextProcessor]:
    """Returns what describes a LLaVA-NeXT of `tile` x `tile` pixels without weights."""
    pinpoints = _pinpoints(tile)
    config = transformers.LlavaNextConfig(
        **_llava_settings(size, tokenizer, tile), image_grid_pinpoints=pinpoints
    )
    images = transformers.LlavaNextImageProcessor(
        **_square(tile), image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=images, **_processor_settings(tokenizer)
    )
    return config, processor


def _llava_settings(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast, tile: int
) -> dict[str, Any]:
    return {
        "vision_config": _clip_config(size, tile),
        "text_config": transformers.LlamaConfig(**text_settings(size, tokenizer)),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (tile // PATCH_SIZE) ** 2,
    }


def _processor_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": tokenizer.chat_template,
    }


def _square(side: int) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }


def _pinpoints(tile: int) -> list[list[int]]:
    return [
        [rows * tile, columns * tile]
        for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ]


def llava_onevision(out_dir: Path, size: ModelSize, seed: int) -> None:
    """LLaVA-OneVision: 64 tokens for the whole image, and 64 at most a tile."""
    _check_head_size("llava_onevision", size)
    tile = 112
    tokenizer = make_tokenizer("llava_onevision", ["<image>", "<video>"])
    settings = text_settings(size, tokenizer)
    del settings["head_dim"]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=size.vision_hidden_size,
            intermediate_size=size.vision_intermediate_size,
            num_hidden_layers=size.vision_num_layers,
            num_attention_heads=size.vision_num_heads,
            image_size=tile,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        text_config=transformers.Qwen2Config(**settings),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_pinpoints(tile),
        vision_aspect_ratio="anyres_max_4",
    )
    tile_size = {"height": tile, "width": tile}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=tile_size, image_grid_pinpoints=config.image_grid_pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=tile_size),
        num_image_tokens=(tile // PATCH_SIZE) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
    restore_clip_names(out_dir)


def qwen2_5_vl(out_dir: Path, size: ModelSize, seed: int) -> None:
    """Qwen2.5-VL: one token per 28 x 28 pixels, 64 to 400 per image, with mRoPE."""
    _check_head_size("qwen2_5_vl", size)
    tokenizer = make_tokenizer(
        "qwen2_5_vl",
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    )
    # Pairs of channels that turn with time, height and width, as the real 16, 24, 24.
    temporal = size.head_size // 8
    height = (size.head_size // 2 - temporal) // 2
    width = size.head_size // 2 - temporal - height
    settings = text_settings(size, tokenizer)
    del settings["head_dim"]
    config = transformers.Qwen2_5_VLConfig(
        text_config=settings
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [temporal, height, width],
            }
        },
        vision_config={
            "depth": size.vision_num_layers,
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_intermediate_size,
            "num_heads": size.vision_num_heads,
            "out_hidden_size": size.hidden_size,
            "fullatt_block_indexes": [size.vision_num_layers - 1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    pixels = {"shortest_edge": 64 * 28**2, "longest_edge": 400 * 28**2}
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=pixels),
        chat_template=tokenizer.chat_template,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    save(out_dir, model, processor, seed)


def idefics3(out_dir: Path, size: ModelSize, seed: int) -> None:
    """Idefics3: 64 tokens for the whole image and for each of its 1 to 4 tiles."""
    tile, patch_size, scale_factor = 128, 8, 2
    tokenizer = make_tokenizer(
        "idefics3",
        [
            "<image>",
            "<fake_token_around_image>",
            "<global-img>",
            "<end_of_utterance>",
            *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
        ],
    )
    config = transformers.Idefics3Config(
        vision_config={
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_intermediate_size,
            "num_hidden_layers": size.vision_num_layers,
            "num_attention_heads": size.vision_num_heads,
            "image_size": tile,
            "patch_size": patch_size,
        },
        text_config=transformers.LlamaConfig(**text_settings(size, tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=scale_factor,
    )
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 2 * tile}, max_image_size={"longest_edge": tile}
        ),
        tokenizer=tokenizer,
        image_seq_len=(tile // patch_size // scale_factor) ** 2,
        chat_template=tokenizer.chat_template,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    save(out_dir, model, processor, seed)


def internvl(out_dir: Path, size: ModelSize, seed: int) -> None:
    """InternVL: 64 tokens for each of up to 4 tiles, and 64 for a thumbnail."""
    _check_head_size("internvl", size)
    tile, downsample = 224, 2
    tokenizer = make_tokenizer(
        "internvl",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    num_tile_tokens = (tile // PATCH_SIZE // downsample) ** 2
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_intermediate_size,
            "num_hidden_layers": size.vision_num_layers,
            "num_attention_heads": size.vision_num_heads,
            "image_size": [tile, tile],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "layer_scale_init_value": 1.0,
        },
        text_config=transformers.Qwen2Config(**text_settings(size, tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=num_tile_tokens,
        downsample_ratio=1 / downsample,
        tie_word_embeddings=False,
    )
    tile_size = {"height": tile, "width": tile}
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=tile_size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=tile_size),
        image_seq_length=num_tile_tokens,
        chat_template=tokenizer.chat_template,
    )
    model = transformers.InternVLForConditionalGeneration(config)
    save(out_dir, model, processor, seed)


def _check_head_size(name: str, size: ModelSize) -> None:
    """Rejects what vLLM's Qwen 2 cannot have: a free head size."""
    if size.num_heads * size.head_size != size.hidden_size:
        raise ValueError(
            f"head_size={size.head_size} must be hidden_size / num_heads = "
            f"{size.hidden_size / size.num_heads} for {name}"
        )


def text_settings(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Returns what language models' configurations have in common."""
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_size,
        "max_position_embeddings": size.max_position_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _clip_config(size: ModelSize, image_size: int) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=size.vision_hidden_size,
        intermediate_size=size.vision_intermediate_size,
        num_hidden_layers=size.vision_num_layers,
        num_attention_heads=size.vision_num_heads,
        image_size=image_size,
        patch_size=PATCH_SIZE,
    )
