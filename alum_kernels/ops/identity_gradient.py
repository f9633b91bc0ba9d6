"""A perturbed tensor whose gradient goes to the tensor that was perturbed, unchanged."""

import torch
from torch import Tensor


class IdentityGradient(torch.autograd.Function):
    """``perturbed`` (computed outside autograd), differentiated as if it were ``embeds``."""

    @staticmethod
    def forward(ctx, embeds: Tensor, perturbed: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
        ):  # Dynamo does not trace mark_dirty, and turns changes in place into new tensors
            return perturbed.view_as(perturbed)
        ctx.mark_dirty(perturbed)  # the tensor itself goes on, not a view: a model may change it in place
        return perturbed

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
