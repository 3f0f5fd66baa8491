"""Writes small random-weight vision-language checkpoints that stock vLLM serves."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from benchmarks.testing.models import architectures, gemma, llama, mistral, qwen
from benchmarks.testing.models.images import random_image
from benchmarks.testing.models.size import TINY, ModelSize
from benchmarks.testing.models.tokens import image_prompt

__all__ = ["MODELS", "TINY", "ModelSize", "build", "image_prompt", "random_image"]

MARKER = "vllm_avl_checkpoint.json"
# Part of the marker: raise it when the same settings come to give different files.
RECIPE = 2

MODELS: dict[str, Callable[[Path, ModelSize, int], None]] = {
    "llava": architectures.llava,
    "llava_next": architectures.llava_next,
    "qwen2_5_vl": architectures.qwen2_5_vl,
    "idefics3": architectures.idefics3,
    "internvl": architectures.internvl,
    "llava_onevision": architectures.llava_onevision,
    "qwen3_vl": qwen.qwen3_vl,
    "glm4_1v": qwen.glm4_1v,
    "glm_ocr": qwen.glm_ocr,
    "mistral3": mistral.mistral3,
    "pixtral": mistral.pixtral,
    "gemma3": gemma.gemma3,
    "gemma4": gemma.gemma4,
    "qwen3_5": qwen.qwen3_5,
    "llama4": llama.llama4,
}
HYBRID = ModelSize(hidden_size=128, num_layers=6, num_heads=2, num_kv_heads=1)
"""Two layers with full attention, and four without."""
SIZES = dict.fromkeys(("gemma3", "gemma4", "qwen3_5", "llama4"), HYBRID)
"""By default, of architectures for which it is not `ModelSize()`."""


def build(
    name: str, out_dir: Path | str, size: ModelSize | None = None, seed: int = 0
) -> Path:
    """Writes the checkpoint `name` to `out_dir`, unless it is there already.

    The files appear all at once, so processes may build the same one in parallel.

    Args:
        name: A key of `MODELS`.
        out_dir: Replaced if it holds a checkpoint of ours made with other settings.
        size: Defaults to the architecture's in `SIZES`.
        seed: Seeds the weights.

    Returns:
        `out_dir`, to give to vLLM as the model.

    Raises:
        ValueError: `name` is unknown, `size` does not fit the architecture, or
            `out_dir` holds something that this function did not write.
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} must be one of {sorted(MODELS)}")
    size = size or SIZES.get(name, ModelSize())
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
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as scratch:
        new_dir = Path(scratch) / "checkpoint"
        MODELS[name](new_dir, size, seed)
        (new_dir / MARKER).write_text(json.dumps(settings, indent=2) + "\n")
        _move(new_dir, out_dir, settings)
    return out_dir


def _move(new_dir: Path, out_dir: Path, settings: dict[str, Any]) -> None:
    if _settings_of(out_dir) not in (None, settings):
        shutil.rmtree(out_dir)
    try:
        new_dir.rename(out_dir)
    except OSError:
        # Another process may have been faster; its files equal ours.
        if _settings_of(out_dir) != settings:
            raise


def _settings_of(out_dir: Path) -> dict[str, Any] | None:
    """Returns what `out_dir` was made with, None when there is nothing in it."""
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return None
    marker = out_dir / MARKER
    if not marker.exists():
        raise ValueError(f"out_dir={str(out_dir)!r} is not empty and has no {MARKER}")
    return json.loads(marker.read_text())
