"""Cross-entropy of a linear head with a chunk of its logits at most: the task's loss beside ``linear_symmetric_kl``.

PyTorch has it, ``torch.nn.functional.linear_cross_entropy`` in chunks, since version 2.13; it is taken for plain fp32
heads. Half-precision or autocast heads, for which it would sum in half precision, soft caps, and older versions go
through recomputed chunks. Few rows take the plain path: their logits fit the budget of a chunk.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alum_kernels.backends.linear_chunks import chunk_budget
from alum_kernels.backends.soft_cap import finished_logits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Sum over the rows of the cross-entropy of a linear head's logits; differentiable.

    Args:
        hidden: (N, H).
        weight: (V, H).
        labels: (N,) int64 in [0, V).
        bias: (V,) or None.
        logit_scale, soft_cap, chunk_bytes: as in :func:`alum_kernels.linear_symmetric_kl`.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).
    """

    def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = finished_logits(functional.linear(hidden, weight, bias), logit_scale, soft_cap)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(wide), labels, reduction="sum")

    budget = chunk_budget(chunk_bytes, hidden.device)
    rows = max(budget // (weight.shape[0] * 4), 1)
    if hidden.shape[0] <= rows:
        return of_chunk(hidden, labels)
    plain = logit_scale == 1.0 and soft_cap is None and {hidden.dtype, weight.dtype} == {torch.float32}
    chunked = getattr(functional, "linear_cross_entropy", None)
    if chunked is not None and plain and not torch.is_autocast_enabled(hidden.device.type):
        options = nn.LinearCrossEntropyOptions(allow_retain_graph=True)
        return chunked(hidden, weight, labels, linear_bias=bias, reduction="sum", options=options)
    pairs = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.stack([checkpoint(of_chunk, *pair, use_reentrant=False) for pair in pairs]).sum()
