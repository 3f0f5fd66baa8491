"""A small vision-language model that really sees, trained from scratch on a CPU.

Its weights are in `WEIGHTS`, a checkpoint that stock vLLM serves; `prompt` writes what
it was trained to answer.
"""

from pathlib import Path

from vllm_avl.bundled.tokens import prompt

__all__ = ["LIMITS", "WEIGHTS", "prompt"]

WEIGHTS = Path(__file__).parent / "weights"
LIMITS = (
    "The demo model has two million parameters: it knows drawn scenes and documents, "
    "and nothing else."
)
