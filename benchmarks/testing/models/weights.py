"""Random weights under which attention selects and greedy output is clear and varied.

A weight is drawn with std = gain / sqrt(fan in), so that normalised inputs give outputs
of std = gain. An attention logit then has std = QK_GAIN ** 2.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

QK_GAIN = 1.6
DOWN_GAIN = 2.0
LM_HEAD_GAIN = 4.0
EMBEDDING_STD = 0.5
BIAS_STD = 0.1
# How much of its own embedding a token's output row is lowered by, against repeats.
REPEAT_PENALTY = 0.15

EMBEDDINGS = ("embed_tokens.weight", "position_embedding.weight")
EMBEDDING_VECTORS = (
    "class_embedding",
    "cls_token",
    "image_newline",
    "position_embeddings",
    "positional_embedding_vlm",
)
QUERY_KEY = (".q_proj.", ".k_proj.", ".qkv.")


def save(
    out_dir: Path, model: PreTrainedModel, processor: ProcessorMixin, seed: int
) -> None:
    """Writes `model` with random fp32 weights, and its processor."""
    model.to(torch.float32)
    randomize(model, processor.tokenizer, seed)
    model.save_pretrained(out_dir)
    processor.save_pretrained(out_dir)


def restore_clip_names(out_dir: Path) -> None:
    """Gives CLIP weights their published names, the only ones vLLM 0.32 loads.

    Transformers 5 writes `vision_tower.*` for `vision_tower.vision_model.*`.
    """
    path = out_dir / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {
        name if new in name else name.replace(old, new): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


@torch.no_grad()
def randomize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    """Draws every weight but the norms'.

    Only printable ASCII can be generated greedily, so that the text shows the token
    ids and no request ends early: the other rows of the output layer are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        std = _std(name, weight)
        if std is not None:
            weight.normal_(0.0, std, generator=generator)
    head = model.get_output_embeddings().weight
    head -= REPEAT_PENALTY * model.get_input_embeddings().weight
    printable = tokenizer.encode(
        "".join(map(chr, range(32, 127))), add_special_tokens=False
    )
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[printable] = False
    head[silent] = 0.0


def _std(name: str, weight: torch.Tensor) -> float | None:
    """Returns the standard deviation to draw a weight with, None to leave it."""
    if name.endswith(EMBEDDINGS) or name.endswith(EMBEDDING_VECTORS):
        return EMBEDDING_STD
    if name.endswith(".bias"):
        return BIAS_STD
    if weight.dim() < 2:
        return None
    # Experts are the only ones with what comes in ahead of what goes out.
    fan_in = weight.shape[1] if ".experts." in name else weight[0].numel()
    return _gain(name) / fan_in**0.5


def _gain(name: str) -> float:
    if any(part in name for part in QUERY_KEY):
        return QK_GAIN
    if "down_proj" in name:
        return DOWN_GAIN
    return LM_HEAD_GAIN if "lm_head" in name else 1.0
