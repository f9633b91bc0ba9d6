"""``symmetric_kl`` and its relatives ``kl`` and ``js``: divergences between the softmaxes of two sets of logits.

What the ops compute is stated in ``alum_kernels/backends/reference/symmetric_kl.py``. Three kernels a backend:

    loss                   reads both logits, writes the loss of each row and five floats for the backward
    gradient               from those floats and the upstream gradient of each row, writes the logit gradients
    loss and gradient      both at once, of one side or of both: for callers who own the upstream factor, as the ascent

Nothing of the size of the logits is kept besides the logits.
"""

import torch
from torch import Tensor

from alum_kernels.backends.reference import symmetric_kl as reference
from alum_kernels.ops import checks
from alum_kernels.ops.dispatch import LIBRARY, choose, implementation
from alum_kernels.ops.reductions import REDUCTIONS, mask_weight, reduce_rows, row_share

DIVERGENCES = ("symmetric_kl", "kl", "js")
GRADIENTS = ("full", "detach_targets", "detach_clean")
ROW_STATISTICS = 5

_PT2 = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "symmetric_kl_loss(Tensor a, Tensor b, Tensor? row_weight, str divergence, float inv_temperature, str backend)"
    " -> (Tensor, Tensor)",
    tags=_PT2,
)
LIBRARY.define(
    "symmetric_kl_gradient(Tensor a, Tensor b, Tensor statistics, Tensor grad_rows, str divergence, str gradient,"
    " float inv_temperature, bool wants_a, bool wants_b, str backend) -> (Tensor, Tensor)",
    tags=_PT2,
)
LIBRARY.define(
    "symmetric_kl_loss_and_gradient(Tensor a, Tensor b, Tensor? row_weight, str divergence, str gradient,"
    " float inv_temperature, float grad_scale, bool wants_b, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_PT2,
)


def _unit_columns(logits: Tensor) -> Tensor:
    """(O, I, V) logits with neighbouring columns; rows may lie anywhere."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _loss(
    a: Tensor, b: Tensor, row_weight: Tensor | None, divergence: str, inv_temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    rows = torch.empty(a.shape[:2], dtype=torch.float32, device=a.device)
    statistics = torch.empty((ROW_STATISTICS, *a.shape[:2]), dtype=torch.float32, device=a.device)
    implementation("symmetric_kl", backend).loss(
        _unit_columns(a), _unit_columns(b), row_weight, rows, statistics, divergence, inv_temperature
    )
    return rows, statistics


LIBRARY.impl("symmetric_kl_loss", _loss, "CompositeExplicitAutograd")


@torch.library.register_fake("alum_kernels::symmetric_kl_loss", lib=LIBRARY)
def _loss_fake(a, b, row_weight, divergence, inv_temperature, backend):
    rows = a.new_empty(a.shape[:2], dtype=torch.float32)
    return rows, a.new_empty((ROW_STATISTICS, *a.shape[:2]), dtype=torch.float32)


def _gradient(
    a: Tensor,
    b: Tensor,
    statistics: Tensor,
    grad_rows: Tensor,
    divergence: str,
    gradient: str,
    inv_temperature: float,
    wants_a: bool,
    wants_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_a = torch.empty(a.shape if wants_a else (0,), dtype=a.dtype, device=a.device)
    grad_b = torch.empty(b.shape if wants_b else (0,), dtype=b.dtype, device=b.device)
    implementation("symmetric_kl", backend).gradient(
        _unit_columns(a),
        _unit_columns(b),
        statistics,
        grad_rows,
        grad_a,
        grad_b,
        divergence,
        gradient,
        inv_temperature,
    )
    return grad_a, grad_b


LIBRARY.impl("symmetric_kl_gradient", _gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("alum_kernels::symmetric_kl_gradient", lib=LIBRARY)
def _gradient_fake(a, b, statistics, grad_rows, divergence, gradient, inv_temperature, wants_a, wants_b, backend):
    return a.new_empty(a.shape if wants_a else (0,)), b.new_empty(b.shape if wants_b else (0,))


def _loss_and_gradient(
    a: Tensor,
    b: Tensor,
    row_weight: Tensor | None,
    divergence: str,
    gradient: str,
    inv_temperature: float,
    grad_scale: float,
    wants_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.empty(a.shape[:2], dtype=torch.float32, device=a.device)
    grad_a = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    grad_b = torch.empty(b.shape if wants_b else (0,), dtype=b.dtype, device=b.device)
    implementation("symmetric_kl", backend).loss_and_gradient(
        _unit_columns(a),
        _unit_columns(b),
        row_weight,
        rows,
        grad_a,
        grad_b,
        divergence,
        gradient,
        inv_temperature,
        grad_scale,
    )
    return rows, grad_a, grad_b


LIBRARY.impl("symmetric_kl_loss_and_gradient", _loss_and_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("alum_kernels::symmetric_kl_loss_and_gradient", lib=LIBRARY)
def _loss_and_gradient_fake(a, b, row_weight, divergence, gradient, inv_temperature, grad_scale, wants_b, backend):
    rows = a.new_empty(a.shape[:2], dtype=torch.float32)
    return rows, a.new_empty(a.shape), b.new_empty(b.shape if wants_b else (0,))


class _GradientOnce(torch.autograd.Function):
    """The gradient kernel; differentiating it again raises."""

    @staticmethod
    def forward(ctx, a, b, statistics, grad_rows, divergence, gradient, inv_temperature, wants_a, wants_b, backend):
        return torch.ops.alum_kernels.symmetric_kl_gradient(
            a, b, statistics, grad_rows, divergence, gradient, inv_temperature, wants_a, wants_b, backend
        )

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "symmetric_kl, kl, js: second derivatives are not implemented by the fused kernels; "
            "pass backend='reference', which has them"
        )


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
            grad_a, grad_b = _GradientOnce.apply(
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
    """
    return _divergence("js", adv_logits, logits, mask, reduction, gradient, temperature, backend)


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
        divergence: ``"symmetric_kl"``, ``"kl"`` or ``"js"``.
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
