"""Infinities, NaN, empty and degenerate rows: what a divergence is where its formula has none."""

import oracle
import pytest
import torch
from torch import Tensor

from alum_kernels import js, kl, squared_error, squared_hellinger, symmetric_kl, symmetric_kl_grad

DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js, "squared_hellinger": squared_hellinger}
INFINITY, NAN = float("inf"), float("nan")
COLUMNS = (2, 64, 65)
STORED = 2.0**-24
"""The backward knows lse(b) of a row to half a unit in its last place: a gradient is off by that absolute error."""


def names(place) -> tuple[str, ...]:
    return tuple(DIVERGENCES) if place.backend == "reference" else ("symmetric_kl", "kl")


def run(name: str, a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, both gradients of their sum, and the gradient that comes with the loss."""
    x, y = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    rows = DIVERGENCES[name](x, y, reduction="none", backend=backend)
    da, db = torch.autograd.grad(rows, (x, y), torch.ones_like(rows))
    loss, at_once = symmetric_kl_grad(a, b, reduction="none", divergence=name, backend=backend)
    assert torch.equal(loss.nan_to_num(7.0), rows.detach().nan_to_num(7.0))
    assert torch.equal(at_once.isnan(), da.isnan())
    return rows.detach(), da, db, at_once


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("where", [0, -1])
def test_class_that_is_dead_on_both_sides_contributes_nothing(place, columns, where):
    a, b = oracle.logit_pair(3, columns, 0.3, device=place.device)
    dead_a, dead_b = (torch.cat((t, torch.full_like(t[:, :1], -INFINITY)), -1) for t in (a, b))
    if where == 0:
        dead_a, dead_b = dead_a.roll(1, -1), dead_b.roll(1, -1)
    alive = dead_a[0] > -INFINITY
    for name in names(place):
        rows, *gradients = run(name, dead_a, dead_b, place.backend)
        wanted = oracle.divergence_gradient(name, a, b)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b)) <= (4e-6 if columns < 64 else 1e-6)
        for gradient, want in zip(gradients, (*wanted, wanted[0]), strict=True):
            assert (gradient[:, ~alive] == 0).all()
            assert oracle.gradient_errors(gradient[:, alive], want)[0] <= 1e-5


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_class_that_is_dead_on_one_side_makes_its_row_infinite(place, columns, side):
    a, b = oracle.logit_pair(4, columns, 0.3, device=place.device)
    for name in names(place):
        regular = run(name, a, b, place.backend)
        x, y = a.clone(), b.clone()
        {"a": x, "b": y}[side][1, columns // 2] = -INFINITY
        rows, *gradients = run(name, x, y, place.backend)
        assert rows[1] == INFINITY
        assert all(gradient[1].isnan().all() for gradient in gradients)
        for spoilt, whole in zip((rows, *gradients), regular, strict=True):
            assert torch.equal(spoilt[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize(("columns", "value", "side"), [
    (2, NAN, "a"), (2, INFINITY, "b"), (64, NAN, "both"), (64, INFINITY, "a"), (65, NAN, "b"), (65, INFINITY, "both"),
    (65, INFINITY, "a"), (2100, NAN, "a"), (2100, INFINITY, "b"),
])  # fmt: skip
def test_nan_and_infinity_spoil_their_row_and_no_other(place, columns, value, side):
    a, b = oracle.logit_pair(3, columns, 0.3, device=place.device)
    for name in names(place)[:1] if place.interpreted else names(place):
        regular = run(name, a, b, place.backend)
        for position in (0, columns - 1):
            x, y = a.clone(), b.clone()
            for one in {"a": [x], "b": [y], "both": [x, y]}[side]:
                one[1, position] = value
            rows, *gradients = run(name, x, y, place.backend)
            assert rows[1].isnan()
            assert all(gradient[1].isnan().all() for gradient in gradients)
            for spoilt, whole in zip((rows, *gradients), regular, strict=True):
                assert torch.equal(spoilt[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("columns", COLUMNS)
def test_nan_outweighs_a_dead_class(place, columns):
    a, b = oracle.logit_pair(2, columns, 0.3, device=place.device)
    a[0, 0], a[0, 1] = NAN, -INFINITY
    for name in names(place):
        rows, da, _, _ = run(name, a, b, place.backend)
        assert rows.isnan().tolist() == [True, False]
        assert da[0].isnan().all()


@pytest.mark.parametrize("columns", [1, 64, 65, 2100, 8300])
@pytest.mark.parametrize("sides", ["both", "clean"])
def test_row_without_a_class_is_undefined(place, columns, sides):
    """Also where the other side has some: there is no q that a class could be missing from."""
    a, b = oracle.logit_pair(3, columns, 0.3, device=place.device)
    b[1] = -INFINITY
    if sides == "both":
        a[1] = -INFINITY
    rows, da, db, _ = run("symmetric_kl", a, b, place.backend)
    assert rows.isnan().tolist() == [False, True, False]
    assert da[1].isnan().all()
    assert db[1].isnan().all()
    assert da[[0, 2]].isfinite().all()


@pytest.mark.parametrize("columns", [2100, 8300])
def test_dead_classes_in_whole_blocks_of_long_rows(place, columns):
    """Blocks before, between and after the living classes."""
    a, b = oracle.logit_pair(3, columns, 0.3, device=place.device)
    alive = torch.zeros(3, columns, dtype=torch.bool, device=place.device)
    alive[0, -5:] = alive[1, :5] = alive[2, columns // 2 : columns // 2 + 5] = True
    x, y = a.masked_fill(~alive, -INFINITY), b.masked_fill(~alive, -INFINITY)
    few = a[alive].view(3, 5), b[alive].view(3, 5)
    for name in names(place):
        rows, da, db, at_once = run(name, x, y, place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, *few)) <= 4e-6
        wanted = oracle.divergence_gradient(name, *few)
        for gradient, want in ((da, wanted[0]), (db, wanted[1]), (at_once, wanted[0])):
            assert oracle.gradient_errors(gradient[alive].view(3, 5), want)[0] <= 1e-5
            assert (gradient[~alive] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [5, 130])
def test_edges_in_half_precision(place, columns, dtype):
    a, b = oracle.logit_pair(4, columns, 0.3, dtype=dtype, device=place.device)
    a[0, 1] = b[0, 1] = a[1, 0] = -INFINITY
    b[2, 3] = INFINITY
    rows, da, _, _ = run("symmetric_kl", a, b, place.backend)
    assert rows.isfinite().tolist() == [True, False, False, True]
    assert rows[1] == INFINITY
    assert rows[2].isnan()
    assert da.isnan().all(-1).tolist() == [False, True, True, False]
    assert da[0, 1] == 0


@pytest.mark.parametrize("columns", [1, *COLUMNS, 2100])
def test_equal_sides_are_exactly_zero(place, columns):
    a, _ = oracle.logit_pair(4, columns, 0.3, device=place.device)
    a[0, 0] += 30
    for name in names(place):
        for result in run(name, a, a.clone(), place.backend):
            assert (result == 0).all()


def test_one_class_has_no_divergence(place):
    a, b = oracle.logit_pair(5, 1, 10.0, device=place.device)
    for name in names(place):
        for result in run(name, a, b, place.backend):
            assert (result == 0).all()


@pytest.mark.parametrize("columns", [2, 65, 2100])
@pytest.mark.parametrize("shift", [64.0, 3e4])
def test_a_common_shift_changes_no_value(place, columns, shift):
    """Logits far from zero, exact in fp32 at eighths: only their differences count."""
    a, b = (((8 * t).round() / 8) for t in oracle.logit_pair(4, columns, 1.0, device=place.device))
    rows, *gradients = run("symmetric_kl", a, b, place.backend)
    shifted, *moved = run("symmetric_kl", a + shift, b + shift, place.backend)
    torch.testing.assert_close(shifted, rows, rtol=2e-6, atol=0)
    for one, other in zip(moved, gradients, strict=True):
        assert float((one - other).norm()) <= (1e-5 + 2 * STORED * shift) * float(other.norm())


@pytest.mark.parametrize("gap", [40.0, 100.0, 1e4])
@pytest.mark.parametrize("columns", [2, 65])
def test_sides_that_are_certain_of_different_classes(place, columns, gap):
    a, b = oracle.logit_pair(3, columns, 0.3, device=place.device)
    a[:, 0] += gap
    b[:, 1] += gap
    for name in names(place):
        rows, da, db, at_once = run(name, a, b, place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b)) <= 4e-6
        wanted = oracle.divergence_gradient(name, a, b)
        for gradient, want in ((da, wanted[0]), (at_once, wanted[0]), (db, wanted[1])):
            assert gradient.isfinite().all()
            assert float((gradient.cpu().double() - want).norm()) <= (1e-4 + 2 * STORED * gap) * float(wanted[0].norm())


@pytest.mark.parametrize("rise", [5.0, 20.0, 29.0, 31.0])
@pytest.mark.parametrize("columns", [2, 65, 2100, 8300])
def test_class_without_weight_that_overtakes_all_others(place, columns, rise):
    """From a hundred below the others to ``rise`` above: its difference is far larger than the row's."""
    a, b = oracle.logit_pair(3, columns, 0.3, device=place.device)
    a[:, 0], b[:, 0] = a.amax(-1) + rise, b.amax(-1) - 100
    for name in names(place):
        rows, da, db, at_once = run(name, a, b, place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b)) <= 4e-6
        wanted = oracle.divergence_gradient(name, a, b)
        for gradient, want in ((da, wanted[0]), (at_once, wanted[0]), (db, wanted[1])):
            assert float((gradient.cpu().double() - want).norm()) <= (1e-4 + 2 * STORED * 100) * float(wanted[0].norm())


@pytest.mark.parametrize("fall", [5.0, 40.0])
@pytest.mark.parametrize("columns", [65, 2100, 8300])
def test_flat_rows_whose_largest_class_falls(place, columns, fall):
    """Against it all others rise alike, and J is what is left of numbers hundreds of times its size."""
    a, b = oracle.logit_pair(3, columns, 1e-3, scale=0.1, raised=0.2, device=place.device)
    a.scatter_add_(-1, b.argmax(-1, keepdim=True), torch.full((3, 1), -fall, device=place.device))
    for name in names(place):
        rows, da, db, at_once = run(name, a, b, place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b)) <= (4e-6 + 4 * STORED * fall)
        wanted = oracle.divergence_gradient(name, a, b)
        for gradient, want in ((da, wanted[0]), (at_once, wanted[0]), (db, wanted[1])):
            # every difference is known to the places of the one at the largest b
            rounded = 4 * STORED * fall * sum(float(x.cpu().double().softmax(-1).norm()) for x in (a, b))
            assert float((gradient.cpu().double() - want).norm()) <= 1e-5 * float(want.norm()) + rounded


@pytest.mark.parametrize("columns", [65, 2100, 8300])
def test_a_weight_is_exact_where_its_logarithm_is_a_small_difference(place, columns):
    """Of a class whose clean logit, far below the others, takes back what its difference adds."""
    a = torch.zeros(40, columns, device=place.device)
    b = a.clone()
    a[:, 1], b[:, 1] = -5.5 - torch.arange(40, device=place.device) / 64, -60.0
    rows = symmetric_kl(a, b, reduction="none", backend=place.backend)
    assert oracle.relative_error(rows, oracle.divergence("symmetric_kl", a, b)) <= 5e-7


@pytest.mark.parametrize("size", [1e9, 1e20])
@pytest.mark.parametrize(("rows", "columns"), [(500, 2), (500, 65), (20, 2100), (20, 8300)])
def test_huge_logits_have_finite_values_and_gradients(place, rows, columns, size):
    """From 1e7 on the last place of an fp32 logit is a factor of e and more: no more than this can be asked."""
    a, b = (size * t.requires_grad_() for t in oracle.logit_pair(rows, columns, 1.0, device=place.device))
    for name in names(place):
        loss = DIVERGENCES[name](a, b, temperature=0.7, reduction="none", backend=place.backend)
        assert loss.isfinite().all()
        for gradient in torch.autograd.grad(loss.sum(), (a, b)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 130)])
def test_no_rows(place, shape, reduction):
    a, b = (torch.zeros(shape, device=place.device, requires_grad=True) for _ in range(2))
    for name in names(place):
        for mask in (None, torch.ones(shape[:-1], dtype=torch.int64, device=place.device)):
            loss = DIVERGENCES[name](a, b, mask=mask, reduction=reduction, backend=place.backend)
            assert loss.shape == (shape[:-1] if reduction == "none" else ())
            assert loss.sum() == 0
            da, db = torch.autograd.grad(loss.sum(), (a, b))
            assert da.shape == db.shape == shape
            loss, da = symmetric_kl_grad(a, b, mask=mask, reduction=reduction, divergence=name, backend=place.backend)
            assert loss.sum() == 0
            assert da.shape == shape


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("columns", [5, 130])
def test_all_rows_masked(place, columns, reduction):
    a, b = (torch.full((3, columns), NAN, device=place.device, requires_grad=True) for _ in range(2))
    mask = torch.zeros(3, dtype=torch.bool, device=place.device)
    for name in names(place):
        loss = DIVERGENCES[name](a, b, mask=mask, reduction=reduction, backend=place.backend)
        assert (loss == 0).all()
        for gradient in torch.autograd.grad(loss.sum(), (a, b)):
            assert (gradient == 0).all()
        loss, da = symmetric_kl_grad(a, b, mask=mask, reduction=reduction, divergence=name, backend=place.backend)
        assert (loss == 0).all()
        assert (da == 0).all()
    if reduction in ("mean", "none") and place.backend == "reference":
        assert (squared_error(a, b, mask=mask, reduction=reduction) == 0).all()
