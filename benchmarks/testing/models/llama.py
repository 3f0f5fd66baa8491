"""Llama 4: layers that see a chunk of the text beside those with full attention."""

from pathlib import Path

import transformers

from benchmarks.testing.models.architectures import PATCH_SIZE, text_settings
from benchmarks.testing.models.gemma import layer_types
from benchmarks.testing.models.size import ModelSize
from benchmarks.testing.models.tokens import make_tokenizer
from benchmarks.testing.models.weights import save

CHUNK_SIZE = 96
NUM_EXPERTS = 4


def llama4(out_dir: Path, size: ModelSize, seed: int, has_experts: bool = True) -> None:
    """Llama 4: 64 tokens for the whole image, and for each of 2 to 4 tiles if any.

    Every second layer has experts, or none.
    """
    tile = 224
    tokenizer = make_tokenizer(
        "llama4",
        [
            "<|image_start|>",
            "<|image_end|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
            "<|image|>",
            "<|patch|>",
        ],
    )
    types = layer_types(size.num_layers, "chunked_attention")
    config = transformers.Llama4Config(
        text_config=text_settings(size, tokenizer)
        | {
            "intermediate_size_mlp": size.intermediate_size,
            "no_rope_layers": [int(kind == "chunked_attention") for kind in types],
            "attention_chunk_size": CHUNK_SIZE,
            "num_local_experts": NUM_EXPERTS,
            "interleave_moe_layer_step": 2 if has_experts else 0,
            "moe_layers": list(range(1, size.num_layers, 2)) if has_experts else [],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        vision_config={
            "hidden_size": size.vision_hidden_size,
            # Four patches become one token.
            "intermediate_size": 4 * size.vision_hidden_size,
            "num_hidden_layers": size.vision_num_layers,
            "num_attention_heads": size.vision_num_heads,
            "projector_input_dim": size.vision_hidden_size,
            "projector_output_dim": size.vision_hidden_size,
            "vision_output_dim": size.vision_hidden_size,
            "image_size": tile,
            "patch_size": PATCH_SIZE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    processor = transformers.Llama4Processor(
        image_processor=transformers.Llama4ImageProcessor(
            size={"height": tile, "width": tile}, max_patches=4
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        chat_template=tokenizer.chat_template,
    )
    model = transformers.Llama4ForConditionalGeneration(config)
    save(out_dir, model, processor, seed)
