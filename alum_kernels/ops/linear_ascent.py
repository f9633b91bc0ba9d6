"""``linear_symmetric_kl_grad``: the part of ``linear_symmetric_kl`` that an ascent needs.

No gradient of the weight or of the clean side is formed, and the clean side's product may be kept over the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alum_kernels.backends.linear_chunks import chunk_budget, wide_product
from alum_kernels.backends.reference import linear_symmetric_kl as reference
from alum_kernels.ops import checks
from alum_kernels.ops.linear_arguments import (
    as_autocast,
    check_chunk_bytes,
    check_head,
    linear_call,
    without_autocast,
)
from alum_kernels.ops.linear_symmetric_kl import rows_and_gradients, served
from alum_kernels.ops.split_head import EAGER, as_given, is_split, local_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_products(hidden: Tensor, weight: Tensor, *, chunk_bytes: int | None = None) -> Tensor | None:
    """The clean logits without bias, ``hidden weight^T``, to be kept over the steps of an ascent if they fit.

    Args:
        hidden: (..., H) clean hidden states.
        weight: (V, H) of the head; of one that is split over ranks, the slice of this one or a DTensor of all. The
            ranks send each other nothing.
        chunk_bytes: what they may take; None as in :func:`linear_symmetric_kl`.

    Returns:
        (N, V), with the classes of this rank, fp32 (fp64 for fp64 inputs), for ``clean_products`` of
        :func:`linear_symmetric_kl_grad`, without a graph; None where they take more than the budget, which that
        argument accepts as well.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> import torch
        >>> from alum_kernels import linear_products
        >>> linear_products(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        tensor([[1., 2.]])
    """
    check_chunk_bytes(chunk_bytes)
    local = local_head([("hidden", hidden)], weight, None, None)
    (hidden,), weight = local.hidden, local.weight
    checks.check_floating("hidden", hidden)
    checks.check_floating("weight", weight)
    check_head(hidden, weight, split=local.group is not None)
    hidden, weight = as_autocast(hidden.detach(), weight.detach())
    hidden = hidden.reshape(-1, hidden.shape[-1])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.shape[0] * weight.shape[0] * wide.itemsize > chunk_budget(chunk_bytes, hidden.device):
        return None
    with torch.no_grad(), without_autocast(hidden.device):
        return wide_product(hidden, weight.T)


def linear_symmetric_kl_grad(
    adv_hidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    divergence: str = "symmetric_kl",
    grad_scale: float = 1.0,
    clean_products: Tensor | None = None,
    gather_rows: bool = True,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence and its gradient to ``adv_hidden`` alone, as an ascent needs; no gradient of the weight is formed.

    Args:
        adv_hidden, hidden, weight, bias, mask, reduction, temperature, logit_scale, soft_cap, gather_rows: as in
            :func:`linear_symmetric_kl`. With ``reduction="none"`` the gradient is that of the sum.
        chunk_bytes, backend, group: likewise.
        divergence: ``"symmetric_kl"`` or ``"kl"``.
        grad_scale: the gradient is multiplied by it in fp32 before it is rounded; a power of two keeps fp16 gradients
            out of the subnormals.
        clean_products: (N, V), what :func:`linear_products` gave for ``hidden`` and ``weight``: over the K steps of an
            ascent the clean side's product is then formed once. (The reference backend forms it anew.)

    Returns:
        The loss, and d_adv_hidden (..., H) in the dtype of ``adv_hidden``, a DTensor where that is one. Neither carries
        a graph.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`linear_symmetric_kl`.

    Source: the inner step of Liu et al., arXiv:2004.08994, Algorithm 1.

    Example:
        >>> import torch
        >>> from alum_kernels import linear_symmetric_kl_grad
        >>> hidden, weight = torch.tensor([[0.0]]), torch.tensor([[1.0], [0.0]])
        >>> linear_symmetric_kl_grad(hidden + 1, hidden, weight)
        (tensor(0.2311), tensor([[0.4277]]))
    """
    compute = _ascent_over_ranks if is_split(weight, group) else _ascent
    return compute(
        divergence,
        adv_hidden,
        hidden,
        weight,
        bias,
        grad_scale=grad_scale,
        clean_products=clean_products,
        backend=backend,
        mask=mask,
        reduction=reduction,
        temperature=temperature,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        gather_rows=gather_rows,
        chunk_bytes=chunk_bytes,
        group=group,
    )


def _ascent(
    divergence: str,
    adv_hidden: Tensor,
    *operands: Tensor | None,
    grad_scale: float,
    clean_products: Tensor | None,
    backend: str | None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    checks.check_magnitude("grad_scale", grad_scale)
    call = linear_call(divergence, adv_hidden, *operands, gradient="detach_clean", **arguments)
    chosen = served(call, backend)
    if clean_products is not None:
        _check_products(clean_products, call.hidden, call.weight)
    inputs, row_weight = call.detached(), call.row_weight()
    if chosen == "reference":
        leaf = inputs[0].clone().requires_grad_()
        with torch.enable_grad(), without_autocast(call.hidden.device):
            rows = reference.rows(leaf, *inputs[1:], call.row_mask, call.options)
            (gradient,) = torch.autograd.grad((rows * row_weight).sum() * grad_scale, leaf)
        rows = rows.detach()
    else:
        kept = None if clean_products is None else clean_products.contiguous()
        only_adv = [True, False, False, False]
        rows, gradient, *_ = rows_and_gradients(inputs, row_weight, kept, call.options, only_adv, chosen)
        gradient = gradient * grad_scale
    gradient = gradient.to(adv_hidden.dtype).reshape(adv_hidden.shape)
    return call.reduced(rows), as_given(gradient, adv_hidden)


_ascent_over_ranks = torch.compiler.disable(_ascent, reason=f"linear_symmetric_kl_grad: {EAGER}")


def _check_products(clean_products: Tensor, hidden: Tensor, weight: Tensor) -> None:
    checks.check_floating("clean_products", clean_products)
    expected, wide = (hidden.shape[0], weight.shape[0]), torch.promote_types(hidden.dtype, torch.float32)
    if tuple(clean_products.shape) != expected:
        raise ValueError(f"clean_products: expected shape {expected}, got {checks.shape_of(clean_products)}")
    if clean_products.dtype != wide:
        raise TypeError(f"clean_products: expected dtype {wide}, got {clean_products.dtype}")
    if clean_products.device != hidden.device:
        raise ValueError(f"clean_products: expected device {hidden.device}, got {clean_products.device}")
