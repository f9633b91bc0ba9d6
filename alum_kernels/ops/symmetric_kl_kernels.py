"""The raw ops of ``symmetric_kl`` and ``kl``: schemas, fakes, and the way to the kernels of a backend.

Three kernels a backend:

    loss                   reads both logits, writes the loss of each row and five floats for the backward
    gradient               from those floats and the upstream gradient of each row, writes the logit gradients
    loss and gradient      both at once, of one side or of both: for callers who own the upstream factor, as the ascent
"""

from types import ModuleType

import torch
from torch import Tensor

from alum_kernels.backends import FUSED_DIVERGENCES
from alum_kernels.ops import checks
from alum_kernels.ops.dispatch import LIBRARY, implementation

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


def _kernels(divergence: str, backend: str) -> ModuleType:
    """The kernels of a backend; none of them may take a divergence that it has no branch for for another one."""
    checks.check_choice("divergence", divergence, FUSED_DIVERGENCES)
    return implementation("symmetric_kl", backend)


def _unit_columns(logits: Tensor) -> Tensor:
    """(O, I, V) logits with neighbouring columns; rows may lie anywhere."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _loss(
    a: Tensor, b: Tensor, row_weight: Tensor | None, divergence: str, inv_temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    rows = torch.empty(a.shape[:2], dtype=torch.float32, device=a.device)
    statistics = torch.empty((ROW_STATISTICS, *a.shape[:2]), dtype=torch.float32, device=a.device)
    _kernels(divergence, backend).loss(
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
    _kernels(divergence, backend).gradient(
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
    _kernels(divergence, backend).loss_and_gradient(
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


class GradientOnce(torch.autograd.Function):
    """The gradient kernel; differentiating it again raises."""

    @staticmethod
    def forward(ctx, a, b, statistics, grad_rows, divergence, gradient, inv_temperature, wants_a, wants_b, backend):
        return torch.ops.alum_kernels.symmetric_kl_gradient(
            a, b, statistics, grad_rows, divergence, gradient, inv_temperature, wants_a, wants_b, backend
        )

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "symmetric_kl, kl: second derivatives are not implemented by the fused kernels; "
            "pass backend='reference', which has them"
        )
