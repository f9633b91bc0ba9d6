"""Cross-entropy of a linear head in chunks: the plain one's numbers, whichever path the sizes and dtypes take."""

import pytest
import torch
from torch import Tensor, nn

from alum_kernels.backends.soft_cap import finished_logits
from alum_kernels.ops.linear_cross_entropy import linear_cross_entropy

ROWS, SIZE, CLASSES = 23, 12, 40


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in ((ROWS, SIZE), (CLASSES, SIZE), (CLASSES,))]
    return tuple(tensor.to(dtype).requires_grad_() for tensor in made)


LABELS = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = finished_logits(nn.functional.linear(hidden, weight, bias), scale, cap)
    return nn.functional.cross_entropy(logits, LABELS, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [100, 5])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (0.5, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradients(dtype, scale, cap, chunk_rows):
    hidden, weight, bias = given = leaves(dtype)
    options = {"logit_scale": scale, "soft_cap": cap, "chunk_bytes": 4 * CLASSES * chunk_rows}
    loss = linear_cross_entropy(hidden, weight, LABELS, bias, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(loss, given, retain_graph=True)
    again = torch.autograd.grad(loss, given)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = plain(*exact, scale, cap)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for got, repeated, want in zip(grads, again, torch.autograd.grad(expected, exact), strict=True):
        assert (got.double() - want).norm() <= tolerance * want.norm()
        assert torch.equal(repeated, got)


@pytest.mark.parametrize("chunk_rows", [100, 5])
def test_autocast_sums_in_fp32(chunk_rows):
    hidden, weight, bias = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, LABELS, bias, chunk_bytes=4 * CLASSES * chunk_rows)
        expected = plain(hidden, weight, bias, 1.0, None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=0)
    (grad,) = torch.autograd.grad(loss, weight)
    (want,) = torch.autograd.grad(expected, weight)
    assert grad.dtype == torch.float32
    assert (grad - want).norm() <= 2e-2 * want.norm()


def test_no_rows():
    hidden, weight, bias = leaves()
    loss = linear_cross_entropy(hidden[:0], weight, LABELS[:0], bias)
    loss.backward()
    assert loss.item() == 0
    assert (weight.grad == 0).all()
