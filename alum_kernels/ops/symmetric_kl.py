"""``symmetric_kl`` and its relatives ``kl``, ``js`` and ``squared_hellinger``: divergences between two softmaxes.

What they compute is stated in ``alum_kernels/backends/reference/symmetric_kl.py``, which kernels compute it in
``symmetric_kl_kernels.py``. Nothing of the size of the logits is kept besides the logits.
"""

import torch
from torch import Tensor

from alum_kernels.backends.reference import symmetric_kl as reference
from alum_kernels.ops import checks
from alum_kernels.ops.dispatch import choose
from alum_kernels.ops.reductions import REDUCTIONS, mask_weight, reduce_rows, row_share
from alum_kernels.ops.symmetric_kl_kernels import GradientOnce

DIVERGENCES = ("symmetric_kl", "kl", "js", "squared_hellinger")
GRADIENTS = ("full", "detach_targets", "detach_clean")


class _RowDivergence(torch.autograd.Function):
    """Divergence of each row of (O, I, V) logits, (O, I)."""

    @staticmethod
    def forward(ctx, a, b, row_weight, divergence, gradient, inv_temperature, backend):
        if backend == "reference":
            rows, statistics = reference.loss(a, b, row_weight, divergence=divergence, inv_temperature=inv_temperature)
            ctx.save_for_backward(a, b)
        else:
            rows, statistics = torch.ops.alum_kernels.symmetric_kl_loss(
                a, b, row_weight, divergence, inv_temperature, backend
            )
            ctx.save_for_backward(a, b, statistics)
        ctx.options = (divergence, gradient, inv_temperature, backend)
        return rows

    @staticmethod
    def backward(ctx, grad_rows):
        divergence, gradient, inv_temperature, backend = ctx.options
        wants_a = ctx.needs_input_grad[0]
        wants_b = ctx.needs_input_grad[1] and gradient != "detach_clean"
        if backend == "reference":
            a, b = ctx.saved_tensors
            grad_a, grad_b = reference.gradient(
                a, b, grad_rows, divergence=divergence, gradient=gradient, inv_temperature=inv_temperature
            )
        else:
            a, b, statistics = ctx.saved_tensors
            grad_a, grad_b = GradientOnce.apply(
                a, b, statistics, grad_rows, divergence, gradient, inv_temperature, wants_a, wants_b, backend
            )
        return grad_a if wants_a else None, grad_b if wants_b else None, None, None, None, None, None


def _check(
    adv_logits: Tensor, logits: Tensor, mask: Tensor | None, reduction: str, gradient: str, temperature: float
) -> float:
    """Check the arguments of a divergence; the inverse temperature."""
    checks.check_floating("adv_logits", adv_logits)
    checks.check_floating("logits", logits)
    if adv_logits.dim() < 2:
        raise ValueError(f"adv_logits: expected shape (..., V) with a row dimension, got {checks.shape_of(adv_logits)}")
    if adv_logits.shape[-1] == 0:
        raise ValueError(f"adv_logits: expected at least one class, got shape {checks.shape_of(adv_logits)}")
    checks.check_like("logits", logits, "adv_logits", adv_logits)
    checks.check_mask(mask, adv_logits.shape[:-1], adv_logits.device)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_choice("gradient", gradient, GRADIENTS)
    if checks.check_magnitude("temperature", temperature) == 0:
        raise ValueError("temperature: expected a number > 0, got 0")
    return 1.0 / temperature


def _as_rows(logits: Tensor) -> Tensor:
    """(O, I, V) view of (..., V) logits: a slice of a sequence, (B, S - 1, V) of (B, S, V), is not copied."""
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    return logits if logits.dim() == 3 else logits.flatten(0, -3)


def _divergence(
    name: str,
    adv_logits: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    reduction: str,
    gradient: str,
    temperature: float,
    backend: str | None,
) -> Tensor:
    inv_temperature = _check(adv_logits, logits, mask, reduction, gradient, temperature)
    chosen = choose("symmetric_kl", backend, adv_logits, name)
    weight = mask_weight(mask, reduction, adv_logits.shape[:-1], adv_logits.dtype)
    a, b = _as_rows(adv_logits), _as_rows(logits)
    rows = _RowDivergence.apply(
        a, b, None if weight is None else weight.reshape(a.shape[:2]), name, gradient, inv_temperature, chosen
    )
    return reduce_rows(rows.reshape(adv_logits.shape[:-1]), weight, reduction)


def symmetric_kl(
    adv_logits: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Symmetric Kullback-Leibler divergence KL(p||q) + KL(q||p) of p = softmax(adv_logits), q = softmax(logits).

    Exact to fp32 rounding at any perturbation. (Two calls of ``torch.nn.functional.kl_div`` on fp32 logits that differ
    by 1e-5 have no right digit with probabilities as targets, and two or three with ``log_target=True``.)

    Args:
        adv_logits: (..., V) fp32, bf16, fp16 or fp64 (fp64 on the reference backend), at least one row dimension.
        logits: the clean side, same shape, dtype and device.
        mask: (...) bool or integers 0 and 1; rows where it is 0 count nowhere, whatever they hold.
        reduction: ``"mean"`` over unmasked rows, ``"sum"``, ``"batchmean"`` (sum over the first dimension's size) or
            ``"none"``.
        gradient: ``"full"`` differentiates both sides, ``"detach_targets"`` holds the weights of each one-sided KL
            constant (+-(p - q), what MT-DNN computes), ``"detach_clean"`` differentiates ``adv_logits`` only.
        temperature: both sides are divided by it; the result is not multiplied by its square.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest that can serve.

    Returns:
        fp32 (fp64 for fp64 logits): a scalar, or (...) for ``reduction="none"``. No rows, or none unmasked: 0 with
        zero gradient. A class that is -inf on both sides contributes nothing; -inf on one side only gives +inf; NaN or
        +inf makes its row NaN and no other.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        BackendUnavailableError: ``backend`` cannot serve the call.
        RuntimeError: differentiated twice on a backend other than the reference.

    Source: the regulariser of Jiang et al., arXiv:1911.03437 (equation 3), and of Liu et al., arXiv:2004.08994.

    Example:
        >>> import torch
        >>> from alum_kernels import symmetric_kl
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> value = symmetric_kl(logits + torch.tensor([[1e-5, 0.0, 0.0]]), logits)
        >>> f"{value:.4e}"
        '1.3216e-11'
    """
    return _divergence("symmetric_kl", adv_logits, logits, mask, reduction, gradient, temperature, backend)


def kl(
    adv_logits: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """One-sided divergence KL(softmax(logits) || softmax(adv_logits)); arguments as :func:`symmetric_kl`.

    Source: virtual adversarial training, Miyato et al., arXiv:1704.03976 (equation 5).

    Example:
        >>> import torch
        >>> from alum_kernels import kl
        >>> adv_logits, logits = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
        >>> kl(adv_logits, logits)
        tensor(0.8318)
    """
    return _divergence("kl", adv_logits, logits, mask, reduction, gradient, temperature, backend)


def js(
    adv_logits: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Jensen-Shannon divergence (KL(p||m) + KL(q||m)) / 2, m = (p + q) / 2; arguments as :func:`symmetric_kl`.

    ``gradient="detach_targets"`` equals ``"full"``: the derivative through m vanishes. Served by the reference backend.

    Source: Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991), 145-151.

    Example:
        >>> import torch
        >>> from alum_kernels import js
        >>> adv_logits, logits = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
        >>> js(adv_logits, logits)
        tensor(0.1927)
    """
    return _divergence("js", adv_logits, logits, mask, reduction, gradient, temperature, backend)


def squared_hellinger(
    adv_logits: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Squared Hellinger distance sum_j (sqrt p_j - sqrt q_j)^2 / 2, in [0, 1]; arguments as :func:`symmetric_kl`.

    ``gradient="detach_targets"`` equals ``"full"``: the distance has no target side, and no convention is published.
    A class that is -inf on one side only gives +inf, as with the other divergences, though the sum would be finite.
    Served by the reference backend.

    Source: Beran, "Minimum Hellinger distance estimates for parametric models", Ann. Statist. 5 (1977), 445-463 (there
    without the 1/2).

    Example:
        >>> import torch
        >>> from alum_kernels import squared_hellinger
        >>> adv_logits, logits = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
        >>> squared_hellinger(adv_logits, logits)
        tensor(0.2000)
    """
    return _divergence("squared_hellinger", adv_logits, logits, mask, reduction, gradient, temperature, backend)


def symmetric_kl_grad(
    adv_logits: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    gradient: str = "full",
    temperature: float = 1.0,
    divergence: str = "symmetric_kl",
    grad_scale: float = 1.0,
    clean_gradient: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The divergence and its gradient to ``adv_logits`` in one launch, for callers who own the upstream factor.

    The ascent of adversarial training uses it as
    ``torch.autograd.grad(adv_logits, perturbed, grad_outputs=d_adv_logits)``: no graph through the loss, no second
    read of the logits.

    Args:
        adv_logits, logits, mask, reduction, gradient, temperature, backend: as in :func:`symmetric_kl`. With
            ``reduction="none"`` the gradient is that of the sum.
        divergence: ``"symmetric_kl"``, ``"kl"``, ``"js"`` or ``"squared_hellinger"``.
        grad_scale: the gradient is multiplied by it in fp32 before it is rounded; a power of two keeps fp16 gradients
            out of the subnormals.
        clean_gradient: also the gradient to ``logits``, from the same launch: both logits are read once and both
            gradients written once. (Zero under ``"detach_clean"``.)

    Returns:
        The loss, as :func:`symmetric_kl`, d_adv_logits (..., V) in the dtype of ``adv_logits`` and, with
        ``clean_gradient``, d_logits. None carries a graph.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`symmetric_kl`.

    Example:
        >>> import torch
        >>> from alum_kernels import symmetric_kl_grad
        >>> adv_logits, logits = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> symmetric_kl_grad(adv_logits, logits)
        (tensor(0.2311), tensor([[ 0.4277, -0.4277]]))
    """
    checks.check_choice("divergence", divergence, DIVERGENCES)
    inv_temperature = _check(adv_logits, logits, mask, reduction, gradient, temperature)
    checks.check_magnitude("grad_scale", grad_scale)
    chosen = choose("symmetric_kl", backend, adv_logits, divergence)
    weight = mask_weight(mask, reduction, adv_logits.shape[:-1], adv_logits.dtype)
    a, b = _as_rows(adv_logits.detach()), _as_rows(logits.detach())
    if weight is not None:
        row_weight = weight.reshape(a.shape[:2])
    elif reduction in ("mean", "batchmean"):
        row_weight = row_share(reduction, adv_logits.shape[:-1], a).expand(a.shape[:2])
    else:
        row_weight = None
    if chosen == "reference":
        rows, _ = reference.loss(a, b, row_weight, divergence=divergence, inv_temperature=inv_temperature)
        upstream = torch.full_like(rows, grad_scale) if row_weight is None else row_weight * grad_scale
        grad_a, grad_b = reference.gradient(
            a, b, upstream, divergence=divergence, gradient=gradient, inv_temperature=inv_temperature
        )
    else:
        wants_b = clean_gradient and gradient != "detach_clean"
        rows, grad_a, grad_b = torch.ops.alum_kernels.symmetric_kl_loss_and_gradient(
            a, b, row_weight, divergence, gradient, inv_temperature, grad_scale, wants_b, chosen
        )
    loss = reduce_rows(rows.reshape(adv_logits.shape[:-1]), weight, reduction)
    if not clean_gradient:
        return loss, grad_a.reshape(adv_logits.shape)
    grad_b = torch.zeros_like(b) if gradient == "detach_clean" else grad_b
    return loss, grad_a.reshape(adv_logits.shape), grad_b.reshape(logits.shape)
