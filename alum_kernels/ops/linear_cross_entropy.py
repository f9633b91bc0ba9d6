"""Cross-entropy of a linear head with a chunk of its logits at most: the task's loss beside ``linear_symmetric_kl``.

PyTorch has it, ``torch.nn.functional.linear_cross_entropy`` in chunks, since version 2.13; it is taken for plain fp32
heads. Half-precision or autocast heads, for which it would sum in half precision, soft caps, and older versions go
through recomputed chunks. Few rows take the plain path: their logits fit the budget of a chunk. A head whose vocabulary
is split over ranks has chunks of its own, ``alum_kernels/backends/split_cross_entropy.py``, and its gradients from the
forward, so that no rank waits for another in the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alum_kernels.backends import split_cross_entropy
from alum_kernels.backends.linear_chunks import LinearOptions, Wanted, chunk_budget
from alum_kernels.backends.soft_cap import finished_logits
from alum_kernels.ops.linear_arguments import as_autocast, without_autocast
from alum_kernels.ops.split_head import EAGER, LocalHead, agreed_split, is_split, local_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Sum over the rows of the cross-entropy of a linear head's logits; differentiable.

    Args:
        hidden: (N, H).
        weight: (V, H).
        labels: (N,) int64 in [0, V); rows of -100 count nowhere.
        bias: (V,) or None.
        logit_scale, soft_cap, chunk_bytes: as in :func:`alum_kernels.linear_symmetric_kl`.
        group: likewise, or DTensors: ``weight`` and ``bias`` are this rank's, ``hidden`` and ``labels`` every rank's. A
            label of no rank's class makes the loss infinite.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs). Of a split vocabulary it is differentiable once.

    Raises:
        TypeError, ValueError: of a split vocabulary, as :func:`alum_kernels.linear_symmetric_kl` does.
    """
    options = {"logit_scale": logit_scale, "soft_cap": soft_cap, "chunk_bytes": chunk_bytes}
    if is_split(weight, group):
        return _over_ranks(hidden, weight, labels, bias, group, **options)
    return _whole(hidden, weight, labels, bias, **options)


def _whole(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    soft_cap: float | None,
    chunk_bytes: int | None,
) -> Tensor:
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


@torch.compiler.disable(reason=f"linear_cross_entropy: {EAGER}")
def _over_ranks(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, group: ProcessGroup | None, **options: Any
) -> Tensor:
    local = local_head([("hidden", hidden)], weight, bias, group)
    if local.group is None:
        return _whole(*local.hidden, local.weight, labels, local.bias, **options)
    return _Split.apply(*as_autocast(*local.hidden, local.weight, local.bias), labels, local, options)


class _Split(torch.autograd.Function):
    """The summed loss over ranks; its gradients are formed with it, and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, local: LocalHead, options: dict[str, Any]):
        scale, cap, chunk_bytes = options["logit_scale"], options["soft_cap"], options["chunk_bytes"]
        wanted = Wanted(False, *ctx.needs_input_grad[:3])
        # what decides how many chunks there are and what is summed over the ranks
        call = ("cross-entropy", options, hidden.dtype, chunk_budget(chunk_bytes, hidden.device), wanted.hidden)
        split = agreed_split(local, [("hidden", hidden), ("labels", labels)], call)
        linear = LinearOptions("cross_entropy", "full", 1.0, scale, cap, "none", chunk_bytes)
        with without_autocast(hidden.device):
            loss, *gradients = split_cross_entropy.loss_and_gradients(
                hidden, weight, labels, bias, split, linear, wanted
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        scaled = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None
