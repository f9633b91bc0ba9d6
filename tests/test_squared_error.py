"""``squared_error`` against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alum_kernels import squared_error
from alum_kernels.ops.reductions import REDUCTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))


def weights(mask: torch.Tensor | None, reduction: str, shape: tuple[int, ...]) -> torch.Tensor:
    kept = torch.ones(shape, dtype=torch.float64) if mask is None else (mask != 0).double()
    divisor = {"mean": kept.sum().clamp(min=1), "batchmean": torch.tensor(shape[0])}.get(reduction, torch.tensor(1))
    return kept / divisor


@pytest.mark.parametrize("gradient", ["full", "detach_clean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(dtype, reduction, masked, gradient):
    adv, clean = pair((2, 3, 4), dtype)
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]]) if masked else None
    weight = weights(mask, reduction, (2, 3))
    difference = adv.detach().double() - clean.detach().double()
    rows = (difference**2).sum(-1)
    loss = squared_error(adv, clean, mask=mask, reduction=reduction, gradient=gradient)
    want = torch.where(weight != 0, rows, 0) if reduction == "none" else (rows * weight).sum()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
    loss.sum().backward()
    want = (2 * difference * weight.unsqueeze(-1)).to(dtype)
    torch.testing.assert_close(adv.grad, want, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if gradient == "detach_clean":
        assert clean.grad is None
    else:
        assert torch.equal(clean.grad, -adv.grad)


def test_masked_rows_may_hold_anything():
    adv, clean = (t.detach() for t in pair((3, 2)))
    adv[1], clean[1, 0] = float("nan"), float("inf")
    adv.requires_grad_()
    loss = squared_error(adv, clean, mask=torch.tensor([True, False, True]))
    loss.backward()
    assert loss.isfinite()
    assert (adv.grad[1] == 0).all()
    assert (adv.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_no_rows_and_none_unmasked(shape):
    adv, clean = pair(shape)
    for reduction in ("mean", "sum", "batchmean"):
        loss = squared_error(adv, clean, reduction=reduction)
        assert loss == 0
        assert torch.autograd.grad(loss, adv)[0].shape == shape
    adv, clean = pair((2, 3))
    loss = squared_error(adv, clean, mask=torch.zeros(2, dtype=torch.uint8))
    assert loss == 0
    assert (torch.autograd.grad(loss, adv)[0] == 0).all()


def test_second_derivatives():
    adv, clean = pair((2, 3), torch.float64)
    assert torch.autograd.gradcheck(squared_error, (adv, clean))
    assert torch.autograd.gradgradcheck(squared_error, (adv, clean))


def test_half_precision_differences_are_formed_in_float32():
    adv = torch.full((1, 1), 300.0, dtype=torch.float16)
    assert squared_error(adv, -adv) == 360000.0


@settings(max_examples=25)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    transposed=st.booleans(),
    reduction=st.sampled_from(("mean", "sum", "batchmean")),
)
def test_any_layout(rows, width, transposed, reduction):
    adv, clean = (t.detach() for t in pair((rows, width)))
    if transposed:
        adv = adv.t().contiguous().t()
    divisor = {"mean": rows, "sum": 1, "batchmean": rows}[reduction]
    want = ((adv.double() - clean.double()) ** 2).sum() / divisor
    torch.testing.assert_close(squared_error(adv, clean, reduction=reduction).double(), want, rtol=1e-6, atol=0)
