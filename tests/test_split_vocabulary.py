"""Rows whose classes are cut into slices: their parts meet to what the whole row gives, wherever it is cut."""

import math

import pytest
import torch
from hypothesis import given as given_
from hypothesis import strategies as st
from oracle import divergence as of_whole
from oracle import gradient_errors, logit_pair, relative_error
from torch import Tensor

from alum_kernels.backends.reference import symmetric_kl as reference
from alum_kernels.backends.split_vocabulary import Slice, SplitRows, gradients_of, merged, slice_of
from alum_kernels.ops.linear_arguments import LINEAR_DIVERGENCES
from alum_kernels.ops.symmetric_kl import GRADIENTS


def in_slices(
    difference: Tensor,
    b: Tensor,
    sizes: list[int],
    grad_rows: Tensor | None = None,
    *,
    divergence: str = "symmetric_kl",
    gradient: str = "full",
    inv_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, reference.RowStatistics]:
    """Loss, d/da, d/da + d/db and statistics of rows whose classes are cut into slices of these sizes."""
    grad_rows = torch.ones(len(b), dtype=b.dtype) if grad_rows is None else grad_rows
    parts = [
        slice_of(clean + step, clean, step, inv_temperature)
        for step, clean in zip(difference.split(sizes, 1), b.split(sizes, 1), strict=True)
    ]
    row = merged(Slice(*map(torch.stack, zip(*(told for told, _ in parts), strict=True))), divergence, inv_temperature)
    options = {"divergence": divergence, "gradient": gradient, "inv_temperature": inv_temperature}
    sides = [
        gradients_of(terms, row, rank, grad_rows, **options)
        for rank, (_, terms) in enumerate(parts)
        if terms is not None
    ]
    side_a, both = (torch.cat(side, 1) for side in zip(*sides, strict=True))
    return row.loss, side_a, both, row.statistics


def whole(
    difference: Tensor, b: Tensor, grad_rows: Tensor | None = None, *, gradient: str = "full", **options
) -> tuple[Tensor, Tensor, Tensor, reference.RowStatistics]:
    """The same of rows in one piece, in float64."""
    difference, b = difference.double(), b.double()
    grad_rows = torch.ones(len(b), dtype=b.dtype) if grad_rows is None else grad_rows.double()
    options = {"divergence": "symmetric_kl", "inv_temperature": 1.0} | options
    loss, statistics = reference.loss(b + difference, b, None, difference=difference, **options)
    return loss, *reference.linear_gradient(difference, b, grad_rows, gradient=gradient, **options), statistics


def assert_alike(found, expected, tolerance: float, inv_temperature: float = 1.0) -> None:
    for name, got, want in zip(("loss", "side_a", "both"), found, expected, strict=False):
        assert ((got - want).norm() <= tolerance * want.norm() + 1e-300).item(), name
    for name in ("log_ratio", "mean_p", "mean_q"):  # counted from c, which is the difference at one class or another
        got, want = ((getattr(of[3], name) + of[3].c * inv_temperature) for of in (found, expected))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-12, equal_nan=True, msg=name)
    torch.testing.assert_close(found[3].lse_b, expected[3].lse_b, rtol=tolerance, atol=0, equal_nan=True)


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Sizes of up to five slices, of no and of one class too, at least one class together."""
    return draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum))


@given_(
    sizes=cuts(),
    perturbation=st.sampled_from([1e-6, 1e-3, 1.0, 10.0, 50.0]),
    raised=st.sampled_from([0.0, 24.0]),
    divergence=st.sampled_from(LINEAR_DIVERGENCES),
    gradient=st.sampled_from(GRADIENTS),
    inv_temperature=st.sampled_from([1.0, 0.6]),
    dropped=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_where_a_row_is_cut_changes_nothing(
    sizes, perturbation, raised, divergence, gradient, inv_temperature, dropped, seed
):
    """In float64; classes switched off leave some slices without weight, and the largest logit lies in any."""
    a, b = logit_pair(6, sum(sizes), perturbation, raised=raised, seed=seed)
    difference, b = (a - b).double(), b.double()
    generator = torch.Generator().manual_seed(seed)
    off = torch.rand(sum(sizes), generator=generator) < dropped
    off[torch.randint(sum(sizes), (1,), generator=generator)] = False
    b[:, off] = -math.inf
    grad_rows = torch.tensor([1.0, 0.0, -3.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    options = {"divergence": divergence, "gradient": gradient, "inv_temperature": inv_temperature}
    found = in_slices(difference, b, sizes, grad_rows, **options)
    # two softmaxes that are equal but for 1e-6 leave float64 eleven digits of a second-order quantity
    assert_alike(found, whole(difference, b, grad_rows, **options), 1e-9, inv_temperature)
    assert (found[1][1] == 0).all()
    assert (found[1][:, off] == 0).all()
