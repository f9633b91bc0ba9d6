"""Divergences between the predictions of two hidden states under one linear head, in plain PyTorch.

    b = h W^T + bias        a - b = (h_adv - h) W^T        rows as in ``symmetric_kl.py`` beside this
    d h_adv = G_a W         d h = (S - G_a) W              dW = S^T h + G_a^T (h_adv - h)         S = G_a + G_b

Differentiable twice, float64 for float64 inputs; it holds all logits at once. The oracle of the kernels of that name.
"""

import torch
from torch import Tensor

from alum_kernels.backends.linear_chunks import LinearOptions
from alum_kernels.backends.reference import symmetric_kl
from alum_kernels.backends.soft_cap import soft_cap


class _Rows(torch.autograd.Function):
    """Loss of each row, as a function of the difference of the logits and the clean ones."""

    @staticmethod
    def forward(ctx, difference, clean, row_weight, divergence, gradient, inv_temperature):
        ctx.save_for_backward(difference, clean)
        ctx.options = {"divergence": divergence, "gradient": gradient, "inv_temperature": inv_temperature}
        rows, _ = symmetric_kl.loss(
            clean + difference,
            clean,
            row_weight,
            divergence=divergence,
            inv_temperature=inv_temperature,
            difference=difference,
        )
        return rows

    @staticmethod
    def backward(ctx, grad_rows):
        difference, clean = ctx.saved_tensors
        return *symmetric_kl.linear_gradient(difference, clean, grad_rows, **ctx.options), None, None, None, None


def rows(
    adv_hidden: Tensor,  # (N, H)
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    row_weight: Tensor | None,  # (N,)
    options: LinearOptions,
) -> Tensor:
    """Loss of each row, (N,) fp32 (float64 for float64 inputs), zero where ``row_weight`` is zero; differentiable."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    adv_hidden, hidden, weight = adv_hidden.to(wide), hidden.to(wide), weight.to(wide)
    if row_weight is not None:
        # whatever a row holds that counts nowhere, its product with a zero gradient is zero
        counts = (row_weight != 0).unsqueeze(-1)
        adv_hidden, hidden = torch.where(counts, adv_hidden, 0), torch.where(counts, hidden, 0)
    clean, difference = hidden @ weight.T, (adv_hidden - hidden) @ weight.T
    if bias is not None:
        clean = clean + bias.to(wide)
    inv_temperature = options.inv_temperature
    if options.soft_cap_at is None:
        inv_temperature *= options.logit_scale
    else:
        difference, clean = soft_cap(difference, clean, options.soft_cap_at, options.logit_scale)
    return _Rows.apply(difference, clean, row_weight, options.divergence, options.gradient, inv_temperature)
