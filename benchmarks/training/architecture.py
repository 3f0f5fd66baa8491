"""The model's sizes and its processor: LLaVA with a CLIP tower and a Llama."""

import math

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from vllm_avl.bundled.picture import GRID, NUM_PATCHES, PATCH, SIZE
from vllm_avl.bundled.tokens import IMAGE

VISION_HEAD_SIZE, TEXT_HEAD_SIZE, NUM_TEXT_HEADS = 32, 64, 4
VISION_SIZE, VISION_LAYERS, VISION_INTERMEDIATE = 128, 4, 384
TEXT_SIZE, TEXT_LAYERS, TEXT_INTERMEDIATE = 128, 4, 384
MAX_POSITIONS = 8192
ROPE_THETA = 1e8
"""20 of a head's 32 pairs turn by less than a radian over 700 tokens. With the usual
1e4 it is 9, and a question hardly finds the patch it is about by what that shows."""
IMAGE_MEAN, IMAGE_STD = 0.75, 0.35


def make_config(tokenizer: PreTrainedTokenizerFast) -> transformers.LlavaConfig:
    """Returns the configuration of *tiny* for this vocabulary."""
    return llava_config(
        tower_config(VISION_SIZE, VISION_LAYERS, VISION_INTERMEDIATE),
        transformers.LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=TEXT_SIZE,
            intermediate_size=TEXT_INTERMEDIATE,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=NUM_TEXT_HEADS,
            num_key_value_heads=NUM_TEXT_HEADS,
            head_dim=TEXT_HEAD_SIZE,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            max_position_embeddings=MAX_POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        tokenizer,
    )


def tower_config(
    size: int, layers: int, intermediate: int
) -> transformers.CLIPVisionConfig:
    """Returns the configuration of a tower for pictures of SIZE x SIZE."""
    return transformers.CLIPVisionConfig(
        hidden_size=size,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=size // VISION_HEAD_SIZE,
        image_size=SIZE,
        patch_size=PATCH,
    )


def llava_config(
    tower: transformers.CLIPVisionConfig,
    text: transformers.LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> transformers.LlavaConfig:
    """Returns the configuration of a tower and a language model together."""
    return transformers.LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> transformers.LlavaProcessor:
    """Returns the processor: pictures become SIZE x SIZE, 576 tokens each."""
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[IMAGE_MEAN] * 3,
            image_std=[IMAGE_STD] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


@torch.no_grad()
def make_model(
    config: transformers.LlavaConfig, seed: int
) -> transformers.LlavaForConditionalGeneration:
    """Returns the untrained model.

    Positions start as sines of row and column, from which "the patch to the right" is
    a linear map: with random ones each of the 576 would have to learn its neighbours.
    """
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config).float()
    embeddings = model.model.vision_tower.embeddings
    pixels = 3 * PATCH * PATCH
    embeddings.patch_embedding.weight.normal_(0, pixels**-0.5)
    embeddings.position_embedding.weight[1:] = _sines(config.vision_config.hidden_size)
    return model


def _sines(size: int) -> torch.Tensor:
    """Returns [NUM_PATCHES, size]: wavelengths from 6 patches to twice the picture."""
    frequencies = torch.exp(torch.linspace(0, -math.log(8), size // 4))
    angles = torch.arange(GRID)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], -1) * 0.5
    rows = axis[:, None].expand(-1, GRID, -1)
    columns = axis[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)
