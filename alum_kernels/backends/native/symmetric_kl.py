"""The native kernels of ``symmetric_kl``: ``csrc/cpu/symmetric_kl.h`` and ``csrc/cuda/symmetric_kl.cu``."""

import torch
from torch import Tensor

from alum_kernels.backends.native import require

require()

# In the order of the enums in csrc/core/arguments.h.
DIVERGENCES = {"symmetric_kl": 0, "kl": 1}
GRADIENTS = {"full": 0, "detach_targets": 1, "detach_clean": 2}


def loss(
    a: Tensor,  # (O, I, V), neighbouring columns
    b: Tensor,  # (O, I, V), neighbouring columns
    row_weight: Tensor | None,  # (O, I) fp32; rows of weight zero are skipped
    rows: Tensor,  # (O, I) fp32, written
    statistics: Tensor,  # (5, O, I) fp32, written
    divergence: str,
    inv_temperature: float,
) -> None:
    torch.ops.alum_kernels_native.symmetric_kl_loss(
        a, b, row_weight, rows, statistics, DIVERGENCES[divergence], inv_temperature
    )


def gradient(
    a: Tensor,  # (O, I, V), neighbouring columns
    b: Tensor,  # (O, I, V), neighbouring columns
    statistics: Tensor,  # (5, O, I) fp32
    grad_rows: Tensor,  # (O, I) fp32
    grad_a: Tensor,  # (O, I, V) or empty, written
    grad_b: Tensor,  # (O, I, V) or empty, written
    divergence: str,
    gradient: str,
    inv_temperature: float,
) -> None:
    torch.ops.alum_kernels_native.symmetric_kl_gradient(
        a, b, statistics, grad_rows, grad_a, grad_b, DIVERGENCES[divergence], GRADIENTS[gradient], inv_temperature
    )


def loss_and_gradient(
    a: Tensor,  # (O, I, V), neighbouring columns
    b: Tensor,  # (O, I, V), neighbouring columns
    row_weight: Tensor | None,  # (O, I) fp32; rows of weight zero are skipped
    rows: Tensor,  # (O, I) fp32, written
    grad_a: Tensor,  # (O, I, V), written
    grad_b: Tensor,  # (O, I, V) or empty, written
    divergence: str,
    gradient: str,
    inv_temperature: float,
    grad_scale: float,
) -> None:
    torch.ops.alum_kernels_native.symmetric_kl_loss_and_gradient(
        a,
        b,
        row_weight,
        rows,
        grad_a,
        grad_b,
        DIVERGENCES[divergence],
        GRADIENTS[gradient],
        inv_temperature,
        grad_scale,
    )
