"""``squared_error``: the divergence of regression heads, in plain PyTorch (one value a row leaves nothing to fuse)."""

import torch
from torch import Tensor

from alum_kernels.ops import checks
from alum_kernels.ops.reductions import REDUCTIONS, mask_weight, reduce_rows

GRADIENTS = ("full", "detach_clean")


def squared_error(
    adv_logits: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
) -> Tensor:
    """Squared difference of two predictions, summed over the last dimension.

    Args:
        adv_logits: (..., D) fp32, bf16, fp16 or fp64, at least one row dimension.
        logits: the clean side, same shape, dtype and device.
        mask, reduction: as in :func:`symmetric_kl`.
        gradient: ``"full"`` differentiates both sides, ``"detach_clean"`` ``adv_logits`` only.

    Returns:
        fp32 (fp64 for fp64 predictions): a scalar, or (...) for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Source: the regulariser of Jiang et al., arXiv:1911.03437 (section 2.1), for regression.

    Example:
        >>> import torch
        >>> from alum_kernels import squared_error
        >>> squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]))
        tensor(2.)
    """
    checks.check_floating("adv_logits", adv_logits)
    checks.check_floating("logits", logits)
    if adv_logits.dim() < 2:
        raise ValueError(f"adv_logits: expected shape (..., D) with a row dimension, got {checks.shape_of(adv_logits)}")
    checks.check_like("logits", logits, "adv_logits", adv_logits)
    checks.check_mask(mask, adv_logits.shape[:-1], adv_logits.device)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("gradient", gradient, GRADIENTS)
    dtype = torch.promote_types(adv_logits.dtype, torch.float32)
    clean = logits.detach() if gradient == "detach_clean" else logits
    difference = adv_logits.to(dtype) - clean.to(dtype)
    if mask is not None:  # before the square, whose gradient would carry on what a masked row holds
        difference = torch.where(mask.unsqueeze(-1) != 0, difference, 0)
    rows = (difference**2).sum(-1)
    weight = mask_weight(mask, reduction, rows.shape, dtype)
    return reduce_rows(rows, weight, reduction)
