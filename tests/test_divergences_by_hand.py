"""Divergences whose value and gradients can be written out, their limits, and what they have in common."""

import math

import oracle
import pytest
import torch
from torch import Tensor

from alum_kernels import js, kl, squared_hellinger, symmetric_kl, symmetric_kl_grad
from alum_kernels.backends.reference import symmetric_kl as reference

DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js, "squared_hellinger": squared_hellinger}
ADV_LOGITS = [[1.0, 0.0, -1.0], [0.5, 2.0, -0.5]]
LOGITS = [[0.0, 1.0, -1.0], [1.5, 1.0, 0.0]]
TRUE = [[0.403006, -0.384076, -0.018929], [-0.321463, 0.384443, -0.062981]]
DETACHED = [[0.210256, -0.210256, 0.0], [-0.187798, 0.217329, -0.029531]]


def close(got: Tensor, want: list, tolerance: float = 6e-7) -> None:
    torch.testing.assert_close(
        got.detach().cpu().double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize(
    ("gradient", "want"),
    [("full", TRUE), ("detach_clean", TRUE), ("detach_targets", DETACHED)],
    ids=["full", "detach_clean", "detach_targets"],
)
def test_batchmean_of_two_rows_in_every_convention(place, gradient, want):
    """What two one-sided ``F.kl_div`` in float64 give: with targets that carry a gradient, and with detached ones."""
    a = torch.tensor(ADV_LOGITS, device=place.device, requires_grad=True)
    b = torch.tensor(LOGITS, device=place.device)
    options = {"reduction": "batchmean", "gradient": gradient, "backend": place.backend}
    loss = symmetric_kl(a, b, **options)
    (da,) = torch.autograd.grad(loss, a)
    close(loss, 0.840405)
    close(da, want)
    loss, da = symmetric_kl_grad(a, b, **options)
    close(loss, 0.840405)
    close(da, want)


@pytest.mark.parametrize(
    ("p", "q", "value", "da", "db"),
    [
        ([0.8, 0.2], [0.2, 0.8], 1 / 5, [0.12, -0.12], [-0.12, 0.12]),
        ([0.64, 0.36], [0.36, 0.64], 1 / 25, [0.0672, -0.0672], [-0.0672, 0.0672]),
        ([1, 4, 4], [4, 4, 1], 1 / 9, [-5 / 81, -2 / 81, 7 / 81], [7 / 81, -2 / 81, -5 / 81]),
        ([1, 4, 4, 0], [4, 4, 1, 0], 1 / 9, [-5 / 81, -2 / 81, 7 / 81, 0], [7 / 81, -2 / 81, -5 / 81, 0]),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_squared_hellinger_of_squares(p, q, value, da, db, dtype, tolerance):
    """1 - sum_j sqrt(p_j q_j), and (p_k sum_j sqrt(p_j q_j) - sqrt(p_k q_k)) / 2."""
    a, b = (torch.tensor([x], dtype=dtype).log().requires_grad_() for x in (p, q))
    got = squared_hellinger(a, b)
    close(got, value, tolerance)
    for side, want in zip(torch.autograd.grad(got, (a, b)), (da, db), strict=True):
        close(side[0], want, tolerance)


@pytest.mark.parametrize("perturbation", [0.3, 10.0, 100.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_closed_gradient_is_what_autograd_finds(name, perturbation):
    a, b = (t.double().requires_grad_() for t in oracle.logit_pair(20, 7, perturbation))
    rows, _ = reference.loss(a, b, None, divergence=name, inv_temperature=0.5)
    want = torch.autograd.grad(rows.sum(), (a, b))
    got = reference.gradient(a, b, torch.ones_like(rows), divergence=name, gradient="full", inv_temperature=0.5)
    for side, other in zip(got, want, strict=True):
        torch.testing.assert_close(side, other, rtol=1e-9, atol=1e-12)


def test_bounded_divergences_are_an_eighth_of_the_symmetric_kl_of_small_perturbations():
    """All three have the Fisher information as their second derivative at p = q: J / 8 up to third order."""
    a, b = (t.double() for t in oracle.logit_pair(50, 9, 1e-5))
    want = symmetric_kl(a, b, reduction="none") / 8
    for bounded in (js, squared_hellinger):
        torch.testing.assert_close(bounded(a, b, reduction="none"), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gap", [50.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_divergences_reach_their_bound(dtype, gap):
    """Sides that are certain of different classes: no overflow, a gradient that vanishes, second derivatives too."""
    b = torch.tensor([[0.0, gap, 1.0], [gap, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    a = torch.tensor([[gap, 0.0, 1.0], [0.0, 0.0, gap]], dtype=dtype, requires_grad=True)
    for bounded, bound in ((js, math.log(2)), (squared_hellinger, 1.0)):
        rows = bounded(a, b, reduction="none")
        close(rows, [bound, bound], 2e-7)
        gradients = torch.autograd.grad(rows.sum(), (a, b), create_graph=True)
        for side in gradients:
            assert (side.abs() < 1e-9).all()
        for second in torch.autograd.grad(sum((side * side.detach()).sum() for side in gradients), (a, b)):
            assert second.isfinite().all()


def test_squared_hellinger_is_symmetric_and_has_one_gradient():
    """Sides change places without a trace, and no convention takes anything from the adversarial side."""
    a, b = (t.double().requires_grad_() for t in oracle.logit_pair(6, 9, 1.0))
    rows = squared_hellinger(a, b, reduction="none")
    torch.testing.assert_close(squared_hellinger(b, a, reduction="none"), rows, rtol=1e-13, atol=0)
    da, db = torch.autograd.grad(rows.sum(), (a, b))
    for gradient in ("detach_targets", "detach_clean"):
        loss = squared_hellinger(a, b, reduction="sum", gradient=gradient)
        sides = torch.autograd.grad(loss, (a, b), allow_unused=True)
        assert torch.equal(sides[0], da)
        assert sides[1] is None if gradient == "detach_clean" else torch.equal(sides[1], db)
