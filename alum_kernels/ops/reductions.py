"""How the losses of rows become the result of a divergence: the weight of each row, and the sum."""

import math

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "batchmean", "none")


def mask_weight(mask: Tensor | None, reduction: str, rows: torch.Size, logits_dtype: torch.dtype) -> Tensor | None:
    """Weight of each row in the reduced loss: the mask over what the reduction divides by, formed once.

    fp32, and fp64 for fp64 logits.

    mean = sum over unmasked rows / their number; batchmean = sum / first dimension, masked rows included. An empty
    count divides by one: the sum is then zero. None, without a mask, stands for the equal weights of :func:`row_share`.
    """
    if mask is None:
        return None
    kept = (mask != 0).to(torch.promote_types(logits_dtype, torch.float32))
    if reduction == "mean":
        return kept / kept.sum().clamp(min=1)
    return kept / divisor(reduction, rows) if reduction == "batchmean" else kept


def divisor(reduction: str, rows: torch.Size) -> int:
    """What the sum over unmasked rows of this leading shape is divided by."""
    # neither Python's max nor Size.numel: they would fix a dynamic size
    if reduction == "mean":
        return torch.sym_max(math.prod(rows), 1)
    return torch.sym_max(rows[0], 1) if reduction == "batchmean" else 1


def row_share(reduction: str, rows: torch.Size, like: Tensor) -> Tensor:
    """The weight of every row where none is masked, a scalar of ``like``'s device; fp32, and fp64 for fp64 ``like``."""
    one = torch.ones((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return one / divisor(reduction, rows)


def reduce_rows(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce losses of rows, in the leading shape of the logits."""
    if reduction == "none":
        return rows if weight is None else torch.where(weight != 0, rows, 0)
    if weight is not None:
        return (rows * weight).sum()
    return rows.sum() if reduction == "sum" else rows.sum() / divisor(reduction, rows.shape)
