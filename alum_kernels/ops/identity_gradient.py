"""A perturbed tensor whose gradient goes to the tensor that was perturbed, unchanged."""

import torch
from torch import Tensor


class IdentityGradient(torch.autograd.Function):
    """``perturbed`` (computed outside autograd), differentiated as if it were ``embeds``."""

    @staticmethod
    def forward(ctx, embeds: Tensor, perturbed: Tensor) -> Tensor:
        return perturbed.view_as(perturbed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
