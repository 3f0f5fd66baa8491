"""Muon for the layers' matrices, AdamW for everything else."""

import torch
from torch import nn

from benchmarks.training.adapters import is_adapter
from benchmarks.training.schedule import Rates

WEIGHT_DECAY = 0.02


def make_optimizers(
    module: nn.Module, rates: Rates
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Returns the optimizers of what is not frozen, each with its highest rate."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    adapters: list[nn.Parameter] = []
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        if is_adapter(name):
            adapters.append(weight)
        else:
            is_matrix = weight.dim() == 2 and ".layers." in name
            (matrices if is_matrix else others).append(weight)
    muon = torch.optim.Muon(
        matrices,
        lr=rates.matrix,
        weight_decay=WEIGHT_DECAY,
        adjust_lr_fn="match_rms_adamw",
    )
    pairs = [(muon, rates.matrix), (_adamw(others, rates.other), rates.other)]
    if adapters:
        pairs.append((_adamw(adapters, rates.adapter), rates.adapter))
    return pairs


def _adamw(weights: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
