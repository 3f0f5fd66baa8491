"""Writes a training checkpoint as a model folder that stock vLLM serves."""

import argparse
import hashlib
from pathlib import Path

import torch
import transformers

from benchmarks.testing.models.weights import restore_clip_names
from benchmarks.training.architecture import make_processor
from benchmarks.training.size import Size
from benchmarks.training.sizes import SIZES, tiny
from benchmarks.training.train import CHECKPOINT
from benchmarks.training.trained import load_trained
from vllm_avl.bundled import WEIGHTS

SUMS = "SHA256SUMS"
PREFIX = "llava."


def export(checkpoint: Path, out_dir: Path, size: Size | None = None) -> None:
    """Writes weights (half precision), configuration, tokenizer, processor and sums.

    Args:
        checkpoint: What training saved.
        out_dir: Gets the files.
        size: Of the checkpoint; without it *tiny*.

    Raises:
        ValueError: The checkpoint is of another size.
    """
    size = size or tiny()
    tokenizer, model = size.make(0)
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["learner"]
    load_trained(
        model,
        {
            name.removeprefix(PREFIX): weight
            for name, weight in state.items()
            if name.startswith(PREFIX)
        },
    )
    size.finish(model)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.float16).save_pretrained(out_dir)
    make_processor(tokenizer).save_pretrained(out_dir)
    restore_clip_names(out_dir)
    (out_dir / SUMS).write_text(
        "".join(f"{checksum(path)}  {path.name}\n" for path in summed(out_dir))
    )


def summed(folder: Path) -> list[Path]:
    """Returns the files that the sums cover: all but themselves and the card."""
    skipped = (SUMS, "README.md")
    return sorted(path for path in folder.iterdir() if path.name not in skipped)


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Writes the model and prints its size."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.export",
        description="Write a training checkpoint as a model folder for vLLM.",
    )
    parser.add_argument("run", type=Path, help="the folder given to train --out")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, help="default for tiny: the bundled weights"
    )
    args = parser.parse_args()
    if args.out is None and args.size != "tiny":
        parser.error(f"--size {args.size} needs --out: its weights are not bundled")
    out_dir = args.out or WEIGHTS
    export(args.run / CHECKPOINT, out_dir, SIZES[args.size]())
    num_bytes = sum(path.stat().st_size for path in out_dir.iterdir())
    print(f"{out_dir}: {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
