"""Gemma: layers with sliding windows beside those with full attention."""

from pathlib import Path

import transformers

from vllm_avl.testing.models.architectures import PATCH_SIZE, text_settings
from vllm_avl.testing.models.size import ModelSize
from vllm_avl.testing.models.tokens import make_tokenizer
from vllm_avl.testing.models.weights import restore_clip_names, save

SLIDING_WINDOW = 96
NEWLINES = ["\n" * count for count in range(1, 5)]


def layer_types(num_layers: int, windowed: str = "sliding_attention") -> list[str]:
    """Two layers that are not adapted in front of each with full attention."""
    return [
        windowed if index % 3 < 2 else "full_attention" for index in range(num_layers)
    ]


def gemma3(out_dir: Path, size: ModelSize, seed: int) -> None:
    """Gemma 3: 144 tokens for every image."""
    image_size, num_image_tokens = 336, 144
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
