"""The native row kernel of ``linear_symmetric_kl``: ``csrc/{cpu,cuda}/linear_symmetric_kl.{h,cu}``."""

import torch
from torch import Tensor

from alum_kernels.backends.native import require
from alum_kernels.backends.native.symmetric_kl import DIVERGENCES, GRADIENTS

require()


def divergence_rows(
    first: Tensor,  # (1, N, V) fp32: the adversarial logits before the bias, or their difference from the clean ones
    b: Tensor,  # (1, N, V) fp32: the clean logits before the bias
    bias: Tensor | None,  # (V,) fp32
    row_weight: Tensor | None,  # (1, N) fp32; rows of weight zero are skipped
    rows: Tensor,  # (1, N) fp32, written
    grad_a: Tensor,  # (1, N, V) fp32 (on CUDA also bf16, fp16) or empty, written: weight * d/da; may be `first`
    grad_sum: Tensor,  # the same of d/da + d/db, beside grad_a and for gradient="full" only; may be `b`
    differences: bool,
    divergence: str,
    gradient: str,
    inv_temperature: float,
) -> None:
    torch.ops.alum_kernels_native.linear_divergence(
        first,
        b,
        bias,
        row_weight,
        rows,
        grad_a,
        grad_sum,
        differences,
        DIVERGENCES[divergence],
        GRADIENTS[gradient],
        inv_temperature,
    )
