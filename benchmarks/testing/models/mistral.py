"""Mistral 3 and Pixtral: pictures in rows, with a token behind each."""

from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerFast

from benchmarks.testing.models.architectures import PATCH_SIZE, text_settings
from benchmarks.testing.models.size import ModelSize
from benchmarks.testing.models.tokens import make_tokenizer
from benchmarks.testing.models.weights import save

LONGEST_EDGE = 448
"""For patches that are merged four by four; half of it where they are not."""


def mistral3(out_dir: Path, size: ModelSize, seed: int) -> None:
    """Mistral 3: one token per 28 x 28 pixels, and one behind each row of them."""
    tokenizer = _tokenizer("mistral3")
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(
            **text_settings(size, tokenizer), sliding_window=None
        ),
        vision_config=_tower(size, LONGEST_EDGE),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    save(out_dir, model, _processor(tokenizer, spatial_merge_size=2), seed)


def pixtral(out_dir: Path, size: ModelSize, seed: int) -> None:
    """Pixtral: one token per 14 x 14 pixels, and one behind each row of them."""
    tokenizer = _tokenizer("pixtral")
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(
            **text_settings(size, tokenizer), sliding_window=None
        ),
        vision_config=_tower(size, LONGEST_EDGE // 2),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    save(out_dir, model, _processor(tokenizer, spatial_merge_size=1), seed)


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(name, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])


def _tower(size: ModelSize, longest_edge: int) -> transformers.PixtralVisionConfig:
    return transformers.PixtralVisionConfig(
        hidden_size=size.vision_hidden_size,
        intermediate_size=size.vision_intermediate_size,
        num_hidden_layers=size.vision_num_layers,
        num_attention_heads=size.vision_num_heads,
        image_size=longest_edge,
        patch_size=PATCH_SIZE,
    )


def _processor(
    tokenizer: PreTrainedTokenizerFast, spatial_merge_size: int
) -> transformers.PixtralProcessor:
    edge = LONGEST_EDGE if spatial_merge_size > 1 else LONGEST_EDGE // 2
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": edge}, patch_size=PATCH_SIZE * spatial_merge_size
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        spatial_merge_size=spatial_merge_size,
        chat_template=tokenizer.chat_template,
    )
