"""Low-rank adapters (arXiv 2106.09685) on a language model's projections."""

import transformers
from torch import nn

PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


def add(language_model: transformers.LlamaModel, rank: int) -> None:
    """Freezes a language model and puts adapters on it that change nothing yet.

    Args:
        language_model: Keeps its structure: each projection is wrapped where it is.
        rank: Of each adapter, whose output is doubled, as is usual.
    """
    from peft import LoraConfig, inject_adapter_in_model

    language_model.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), bias="none"
    )
    inject_adapter_in_model(config, language_model)


def merge(model: nn.Module) -> None:
    """Adds every adapter to the weights it sits on and takes it away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name in wrapped:
        layer = model.get_submodule(name)
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())


def is_adapter(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter."""
    return ".lora_" in name
