"""Writes small random-weight vision-language checkpoints that stock vLLM serves."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

MARKER = "vllm_avl_checkpoint.json"
# Part of the marker: raise it when the same settings give different files.
RECIPE = 1

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PLACEHOLDERS = {
    "llava": "<image>\n",
}
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message['role'] | upper + ':' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- IMAGE }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""

# Weights are drawn with std = gain / sqrt(fan in), so with normalised inputs the
# outputs have std = gain; an attention logit then has std = QK_GAIN ** 2.
QK_GAIN = 1.6
LM_HEAD_GAIN = 4.0
EMBEDDING_STD = 0.5
BIAS_STD = 0.1


@dataclass(frozen=True)
class ModelSize:
    """Sizes shared by all architectures; the vision fields size the image tower."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    intermediate_size: int = 512
    max_position_embeddings: int = 8192
    vision_hidden_size: int = 64
    vision_num_layers: int = 2
    vision_num_heads: int = 2
    vision_intermediate_size: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} must be at least 1"
                )
        _check_multiple(self, "num_heads", "num_kv_heads")
        _check_multiple(self, "vision_hidden_size", "vision_num_heads")


def _check_multiple(size: ModelSize, field: str, divisor: str) -> None:
    value, by = getattr(size, field), getattr(size, divisor)
    if value % by:
        raise ValueError(f"{field}={value} must be a multiple of {divisor}={by}")


def build(
    name: str, out_dir: Path | str, size: ModelSize | None = None, seed: int = 0
) -> Path:
    """Writes the checkpoint `name` to `out_dir`, unless it is there already.

    The files appear all at once, so processes may build the same one in parallel.

    Args:
        name: A key of `MODELS`.
        out_dir: Replaced if it holds a checkpoint of ours made with other settings.
        size: Defaults to `ModelSize()`.
        seed: Seeds the weights.

    Returns:
        `out_dir`, to give to vLLM as the model.

    Raises:
        ValueError: `name` is unknown, `size` does not fit the architecture, or
            `out_dir` holds something that this function did not write.
    """
    _check_name(name)
    size = size or ModelSize()
    out_dir = Path(out_dir)
    settings = {
        "name": name,
        "size": asdict(size),
        "seed": seed,
        "recipe": RECIPE,
        "transformers": transformers.__version__,
    }
    if _settings_of(out_dir) == settings:
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}-"))
    try:
        scratch.chmod(0o755)
        MODELS[name](scratch, size, seed)
        (scratch / MARKER).write_text(json.dumps(settings, indent=2) + "\n")
        if _settings_of(out_dir) not in (None, settings):
            shutil.rmtree(out_dir)
        try:
            scratch.rename(out_dir)
        except OSError:
            # Another process may have finished first; its files equal ours.
            if _settings_of(out_dir) != settings:
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out_dir


def _settings_of(out_dir: Path) -> dict[str, Any] | None:
    """Returns what `out_dir` was made with, None when there is nothing in it."""
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return None
    try:
        return json.loads((out_dir / MARKER).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"out_dir={str(out_dir)!r} holds files but no {MARKER}: give an empty folder"
        ) from None


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"name={name!r} must be one of {sorted(MODELS)}")


def image_prompt(name: str, num_images: int, text: str) -> str:
    """Returns the prompt for `LLM.generate`: one user turn, its images first.

    It equals the chat template's rendering of the same turn.
    """
    _check_name(name)
    return f"{BOS}USER:{PLACEHOLDERS[name] * num_images}{text}\nASSISTANT:"


def random_image(seed: int, width: int = 336, height: int = 336) -> Image.Image:
    """Returns an RGB image of coloured shapes on a gradient, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    corners = torch.randint(256, (1, 3, 2, 2), generator=generator).float()
    gradient = torch.nn.functional.interpolate(
        corners, size=(height, width), mode="bilinear", align_corners=True
    )
    pixels = gradient[0].permute(1, 2, 0).to(torch.uint8).contiguous()
    image = Image.fromarray(pixels.numpy())
    draw = ImageDraw.Draw(image)
    for index in range(12):
        x, y = integers(width, 1)[0], integers(height, 1)[0]
        half_width, half_height = (8 + n for n in integers(min(width, height) // 5, 2))
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        red, green, blue = integers(256, 3)
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape(box, fill=(red, green, blue))
    return image


def _tokenizer(
    name: str, special_tokens: Sequence[str], **named_tokens: str
) -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of one token per byte, without merges.

    It adds nothing to a text: prompts spell out the BOS.
    """
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    fast.add_tokens(
        [BOS, EOS, PAD, *special_tokens],
        special_tokens=True,
    )
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", repr(PLACEHOLDERS[name]))
    return fast


def _text_settings(
    size: ModelSize, tokenizer: transformers.PreTrainedTokenizerFast
) -> dict[str, Any]:
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
        patch_size=14,
    )


def _llava(out_dir: Path, size: ModelSize, seed: int) -> None:
    """LLaVA-1.5: 576 vision tokens for every image."""
    tokenizer = _tokenizer("llava", ["<image>"])
    config = transformers.LlavaConfig(
        vision_config=_clip_config(size, image_size=336),
        text_config=transformers.LlamaConfig(**_text_settings(size, tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    _save(out_dir, model, processor, seed)
    _restore_clip_names(out_dir)


def _restore_clip_names(out_dir: Path) -> None:
    """Gives CLIP weights their published names, the only ones vLLM 0.32 loads.

    Transformers 5 writes `vision_tower.*` for `vision_tower.vision_model.*`.
    """
    path = out_dir / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {
        key if new in key else key.replace(old, new): value
        for key, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def _save(
    out_dir: Path,
    model: transformers.PreTrainedModel,
    processor: transformers.ProcessorMixin,
    seed: int,
) -> None:
    model = model.to(torch.float32)
    _randomize(model, processor.tokenizer, seed)
    model.save_pretrained(out_dir)
    processor.save_pretrained(out_dir)


@torch.no_grad()
def _randomize(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    seed: int,
) -> None:
    """Draws every weight but the norms', so that greedy output is clear and varied.

    Only tokens of printable ASCII can win, so that the text shows the token ids and
    no request ends early: the other rows of the output layer are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        std = _std(name, weight)
        if std is not None:
            weight.normal_(0.0, std, generator=generator)
    head = model.get_output_embeddings().weight
    printable = tokenizer.convert_tokens_to_ids(
        tokenizer.tokenize("".join(map(chr, range(32, 127))))
    )
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[printable] = False
    head[silent] = 0.0


def _std(name: str, weight: torch.Tensor) -> float | None:
    """Returns the standard deviation to draw a weight with, None to leave it."""
    if "embed_tokens" in name or "position_embedding" in name:
        return EMBEDDING_STD
    if name.endswith(("class_embedding", "cls_token", "image_newline")):
        return EMBEDDING_STD
    if name.endswith(".bias"):
        return BIAS_STD
    if weight.dim() < 2:
        return None
    gain = 1.0
    if any(part in name for part in (".q_proj.", ".k_proj.", ".qkv.")):
        gain = QK_GAIN
    elif "lm_head" in name:
        gain = LM_HEAD_GAIN
    return gain / weight[0].numel() ** 0.5


MODELS: dict[str, Callable[[Path, ModelSize, int], None]] = {
    "llava": _llava,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Builds one checkpoint from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_avl.testing.models", description=__doc__
    )
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for field in fields(ModelSize):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, type=int, default=field.default, help="default: %(default)s"
        )
    args = parser.parse_args(argv)
    size = ModelSize(**{f.name: getattr(args, f.name) for f in fields(ModelSize)})
    try:
        print(build(args.name, args.out, size, args.seed))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
