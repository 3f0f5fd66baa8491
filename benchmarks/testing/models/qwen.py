"""Later Qwen models and GLM-4.1V: towers of any size, rotary in three axes."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from benchmarks.testing.models import drafters
from benchmarks.testing.models.architectures import PATCH_SIZE, text_settings
from benchmarks.testing.models.gemma import layer_types
from benchmarks.testing.models.size import ModelSize
from benchmarks.testing.models.tokens import make_tokenizer
from benchmarks.testing.models.weights import save

QWEN_PATCH_SIZE = 16


def qwen3_vl(out_dir: Path, size: ModelSize, seed: int) -> None:
    """Qwen3-VL: one token per 32 x 32 pixels, and deep features added to layers."""
    tokenizer = _qwen_tokenizer("qwen3_vl")
    config = transformers.Qwen3VLConfig(
        text_config=text_settings(size, tokenizer)
        | {"rope_parameters": _rope(size, mrope_interleaved=True)},
        vision_config=_qwen_tower(size) | {"deepstack_visual_indexes": [0]},
        **_qwen_ids(tokenizer),
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    save(out_dir, model, _qwen_processor(tokenizer, 64), seed)


def qwen3_5(
    out_dir: Path,
    size: ModelSize,
    seed: int,
    least: int = 400,
    **states: int,
) -> None:
    """Qwen3.5: layers with a recurrent state beside those with full attention.

    Its blocks are as large as a state, and pictures have `least` tokens to fill some.
    `states` are settings of the layers that have one.
    """
    tokenizer = _qwen_tokenizer("qwen3_5")
    config = transformers.Qwen3_5Config(
        text_config=text_settings(size, tokenizer)
        | {
            "layer_types": layer_types(size.num_layers, "linear_attention"),
            "linear_num_key_heads": size.num_kv_heads,
            "linear_num_value_heads": size.num_heads,
            "linear_key_head_dim": size.head_size,
            "linear_value_head_dim": size.head_size,
            "rope_parameters": _rope(
                size, mrope_interleaved=True, partial_rotary_factor=1.0
            ),
        }
        | states,
        vision_config=_qwen_tower(size),
        **_qwen_ids(tokenizer),
    )
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    save(out_dir, model, _qwen_processor(tokenizer, least), seed)


def glm4_1v(out_dir: Path, size: ModelSize, seed: int) -> None:
    """GLM-4.1V: one token per 28 x 28 pixels."""
    tokenizer, settings, others = _glm_settings("glm4_1v", size)
    del settings["head_dim"]
    config = transformers.Glm4vConfig(
        text_config=settings
        | {"rope_parameters": _rope(size, 2, partial_rotary_factor=0.5)},
        **others,
    )
    model = transformers.Glm4vForConditionalGeneration(config)
    save(out_dir, model, _glm_processor(tokenizer), seed)


def glm_ocr(out_dir: Path, size: ModelSize, seed: int) -> None:
    """GLM-OCR: as GLM-4.1V, and a layer behind the last one that predicts a token."""
    tokenizer, settings, others = _glm_settings("glm_ocr", size)
    settings |= {
        "rope_parameters": _rope(size, partial_rotary_factor=1.0),
        # Transformers and vLLM agree on the width of the tower's last layer.
        "intermediate_size": 3 * size.hidden_size,
        "num_nextn_predict_layers": 1,
    }
    config = transformers.GlmOcrConfig(
        text_config=settings,
        **others,
    )
    model = transformers.GlmOcrForConditionalGeneration(config)
    save(out_dir, model, _glm_processor(tokenizer), seed)
    drafters.add_mtp(out_dir, "model.language_model.layers.", seed)


def _glm_settings(
    name: str, size: ModelSize
) -> tuple[PreTrainedTokenizerFast, dict[str, Any], dict[str, Any]]:
    """Returns a tokenizer, the language model's settings and all others."""
    tokens = {
        f"{kind}{part}": f"<|{prefix}{kind}|>"
        for kind in ("image", "video")
        for part, prefix in (
            ("_start", "begin_of_"),
            ("_end", "end_of_"),
            ("", ""),
        )
    }
    tokenizer = make_tokenizer(name, list(tokens.values()))
    others: dict[str, Any] = {
        f"{key}_token_id": tokenizer.convert_tokens_to_ids(token)
        for key, token in tokens.items()
    }
    others["vision_config"] = {
        "depth": size.vision_num_layers,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": size.vision_intermediate_size,
        "num_heads": size.vision_num_heads,
        "out_hidden_size": size.hidden_size,
    }
    return tokenizer, text_settings(size, tokenizer), others


def _glm_processor(tokenizer: PreTrainedTokenizerFast) -> transformers.ProcessorMixin:
    pixels = {"shortest_edge": 64 * 28**2, "longest_edge": 800 * 28**2}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(
            size=pixels, patch_size=PATCH_SIZE
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Glm4vVideoProcessor(size=pixels),
        chat_template=tokenizer.chat_template,
    )


def _qwen_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        name, ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    )


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }


def _qwen_tower(size: ModelSize) -> dict[str, Any]:
    return {
        "depth": size.vision_num_layers,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": size.vision_intermediate_size,
        "num_heads": size.vision_num_heads,
        "out_hidden_size": size.hidden_size,
        "num_position_embeddings": 24**2,
    }


def _qwen_processor(
    tokenizer: PreTrainedTokenizerFast, least: int
) -> transformers.ProcessorMixin:
    """Returns a processor that makes `least` tokens of a picture, or more."""
    pixels = {"shortest_edge": least * 32**2, "longest_edge": 600 * 32**2}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            size=pixels, patch_size=QWEN_PATCH_SIZE, **normal
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=pixels),
        chat_template=tokenizer.chat_template,
    )


def _rope(size: ModelSize, part: int = 1, **settings: Any) -> dict[str, Any]:
    """Returns rotary settings: pairs of channels by time, height and width.

    Args:
        size: of the model.
        part: of a head, a `part`th turns.
        **settings: Others.
    """
    pairs = size.head_size // 2 // part
    time = pairs // 4
    height = (pairs - time) // 2
    section = [time, height, pairs - time - height]
    return {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": section,
        **settings,
    }
