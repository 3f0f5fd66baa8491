"""Gemma: layers with sliding windows beside those with full attention."""

from pathlib import Path

import transformers

from benchmarks.testing.models.architectures import PATCH_SIZE, text_settings
from benchmarks.testing.models.size import ModelSize
from benchmarks.testing.models.tokens import make_tokenizer
from benchmarks.testing.models.weights import restore_clip_names, save

SLIDING_WINDOW = 96
NEWLINES = ["\n" * count for count in range(1, 5)]


def layer_types(num_layers: int, windowed: str = "sliding_attention") -> list[str]:
    """Two layers that are not adapted in front of each with full attention."""
    return [
        windowed if index % 3 < 2 else "full_attention" for index in range(num_layers)
    ]


def gemma3(
    out_dir: Path,
    size: ModelSize,
    seed: int,
    image_size: int = 336,
    num_image_tokens: int = 144,
) -> None:
    """Gemma 3: the same number of tokens for every image."""
    # vLLM joins newlines where placeholders meet.
    tokenizer = make_tokenizer(
        "gemma3",
        NEWLINES,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    config = transformers.Gemma3Config(
        text_config=text_settings(size, tokenizer)
        | {
            "layer_types": layer_types(size.num_layers),
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": size.head_size,
        },
        vision_config={
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_intermediate_size,
            "num_hidden_layers": size.vision_num_layers,
            "num_attention_heads": size.vision_num_heads,
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
        },
        mm_tokens_per_image=num_image_tokens,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(
            size={"height": image_size, "width": image_size}
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=num_image_tokens,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
    restore_clip_names(out_dir)


def gemma4(
    out_dir: Path,
    size: ModelSize,
    seed: int,
    num_image_tokens: int = 140,
    **text: str,
) -> None:
    """Gemma 4: so many tokens at most for an image, larger heads where all is seen.

    `text` are settings of the language model.
    """
    patch_size = 8
    tokenizer = make_tokenizer(
        "gemma4",
        NEWLINES,
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video|>"]})
    settings = text_settings(size, tokenizer)
    config = transformers.Gemma4Config(
        text_config=settings
        | {
            "layer_types": layer_types(size.num_layers),
            "sliding_window": SLIDING_WINDOW,
            "global_head_dim": 2 * size.head_size,
            "vocab_size_per_layer_input": settings["vocab_size"],
            "hidden_size_per_layer_input": 0,
        }
        | text,
        vision_config={
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_intermediate_size,
            "num_hidden_layers": size.vision_num_layers,
            "num_attention_heads": size.vision_num_heads,
            "num_key_value_heads": size.vision_num_heads,
            "head_dim": size.vision_hidden_size // size.vision_num_heads,
            "patch_size": patch_size,
            # vLLM reads it; transformers has no default for it.
            "default_output_length": num_image_tokens,
        },
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(
            patch_size=patch_size, max_soft_tokens=num_image_tokens
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Gemma4VideoProcessor(patch_size=patch_size),
        chat_template=tokenizer.chat_template,
        image_seq_length=num_image_tokens,
    )
    model = transformers.Gemma4ForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
