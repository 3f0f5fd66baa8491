"""The weights that training changes, by name: what a checkpoint holds."""

from collections.abc import Mapping

import torch
from torch import nn


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every weight that is not frozen."""
    return {
        name: weight.detach()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def load_trained(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Replaces every weight that is not frozen.

    Raises:
        ValueError: `state` holds other names than those of these weights.
    """
    wanted = trained_state(module).keys()
    if wanted != state.keys():
        example = min(wanted ^ state.keys())
        raise ValueError(
            f"the checkpoint has {len(state)} weights and must have {len(wanted)}, "
            f"those that this size trains: they differ in {example!r}"
        )
    module.load_state_dict(dict(state), strict=False)
