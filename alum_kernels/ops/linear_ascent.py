"""``linear_symmetric_kl_grad``: the part of ``linear_symmetric_kl`` that an ascent needs.

One product gives the difference of the logits, one the gradient; the clean side's product may be kept over the steps.
"""

import torch
from torch import Tensor

from alum_kernels.backends.linear_chunks import chunk_budget
from alum_kernels.backends.reference import linear_symmetric_kl as reference
from alum_kernels.ops import checks
from alum_kernels.ops.dispatch import choose
from alum_kernels.ops.linear_symmetric_kl import DIVERGENCES, as_autocast, check_linear
from alum_kernels.ops.reductions import mask_weight, reduce_rows, row_share


def linear_products(hidden: Tensor, weight: Tensor, *, chunk_bytes: int | None = None) -> Tensor | None:
    """``hidden weight^T`` in fp32, to be kept over the steps of an ascent, or None where it does not fit the budget.

    Args:
        hidden: (..., H) clean hidden states.
        weight: (V, H).
        chunk_bytes: as in :func:`linear_symmetric_kl`.

    Returns:
        (N, V) fp32, without bias, for ``clean_products`` of :func:`linear_symmetric_kl_grad`.
    """
    hidden, weight = as_autocast(hidden.detach(), weight.detach())
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if hidden.shape[0] * weight.shape[0] * 4 > chunk_budget(chunk_bytes, hidden.device):
        return None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return torch.mm(hidden.float(), weight.T.float())


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
    clean_products: Tensor | None = None,
    gather_rows: bool = True,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence and its gradient to ``adv_hidden`` alone, as an ascent needs; no gradient of the weight is formed.

    Args:
        adv_hidden, hidden, weight, bias, mask, reduction, temperature, logit_scale, soft_cap, gather_rows: as in
            :func:`linear_symmetric_kl`. With ``reduction="none"`` the gradient is that of the sum.
        chunk_bytes, backend: likewise.
        divergence: ``"symmetric_kl"`` or ``"kl"``.
        clean_products: what :func:`linear_products` gave for ``hidden`` and ``weight``: over the K steps of an ascent
            the clean side's product is then formed once.

    Returns:
        The loss, and d_adv_hidden (..., H) in fp32 (fp64 for fp64 inputs). Neither carries a graph.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`linear_symmetric_kl`.

    Example:
        >>> import torch
        >>> from alum_kernels import linear_symmetric_kl_grad
        >>> hidden, weight = torch.tensor([[0.0]]), torch.tensor([[1.0], [0.0]])
        >>> linear_symmetric_kl_grad(hidden + 1, hidden, weight)
        (tensor(0.2311), tensor([[0.4277]]))
    """
    checks.check_choice("divergence", divergence, DIVERGENCES)
    given = [x if x is None else x.detach() for x in (adv_hidden, hidden, weight, bias)]
    adv_hidden, hidden, weight, bias = as_autocast(*given)
    check_linear(
        adv_hidden,
        hidden,
        weight,
        bias,
        mask,
        reduction,
        "detach_clean",
        temperature,
        logit_scale,
        soft_cap,
        chunk_bytes,
    )
    chosen = choose("linear_symmetric_kl", backend, hidden, divergence)
    leading, size = hidden.shape[:-1], hidden.shape[-1]
    flat = adv_hidden.reshape(-1, size), hidden.reshape(-1, size)
    if clean_products is not None and tuple(clean_products.shape) != (flat[1].shape[0], weight.shape[0]):
        expected = (flat[1].shape[0], weight.shape[0])
        raise ValueError(f"clean_products: expected shape {expected}, got {checks.shape_of(clean_products)}")
    row_mask = mask_weight(mask, reduction, leading, hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if row_mask is not None:
        row_weight = row_mask.reshape(-1)
    else:
        row_weight = row_share(reduction, leading, hidden).expand(flat[1].shape[0])
    if chosen == "reference":
        leaf = flat[0].clone().requires_grad_()
        with torch.enable_grad():
            rows = reference.rows(
                leaf,
                flat[1],
                weight,
                bias,
                row_weight,
                divergence=divergence,
                gradient="detach_clean",
                inv_temperature=1.0 / temperature,
                logit_scale=logit_scale,
                soft_cap_at=soft_cap,
            )
            (gradient,) = torch.autograd.grad((rows * row_weight).sum(), leaf)
        rows, gradient = rows.detach(), gradient.to(wide)
    else:
        rows, gradient, *_ = torch.ops.alum_kernels.linear_symmetric_kl(
            *flat,
            weight,
            bias,
            row_weight,
            clean_products,
            divergence,
            "detach_clean",
            1.0 / temperature,
            logit_scale,
            soft_cap,
            gather_rows and mask is not None,
            chunk_bytes,
            [True, False, False, False],
            chosen,
        )
    return reduce_rows(rows.reshape(leading), row_mask, reduction), gradient.reshape(adv_hidden.shape)
