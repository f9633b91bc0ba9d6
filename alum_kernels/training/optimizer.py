"""The optimizer of a training."""

import torch
from torch import nn

from alum_kernels.adversarial.objectives import AdversarialObjective


def adamw(
    model: nn.Module, objective: AdversarialObjective | None, learning_rate: float, weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """AdamW, which the teacher of a proximal term follows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    if objective is not None and objective.config.proximal > 0:
        objective.follow(optimizer)
    return optimizer
