"""Rows of the linear divergence on CUDA, executed on the CPU: from products to what the next products take.

Like test_cuda_kernels_on_host.py: in several orders of the threads, against the reference in float64, whose gradients
of both sides are added there.
"""

import pytest
import torch
from cuda_emulation.checks import (
    DTYPES,
    SMALLEST_NORMAL,
    UNSTAGED,
    bits,
    generator,
    hard_logits,
    on_every_device,
    relative_errors,
    rounding,
    shared_for,
)
from cuda_emulation.emulated import Device, surrounded

from alum_kernels.backends.reference import symmetric_kl as reference_kl


def linear_case(rows, columns, differences, *, seed=0, biased=True):
    """The kernel's inputs, and the float64 logits that they stand for."""
    a, b = hard_logits(rows, columns, seed=seed)
    bias = torch.randn(columns, generator=generator(seed + 1)) if biased else None
    first = (a - b) if differences else a
    added = 0 if bias is None else bias.double()
    exact_b = b.double() + added
    exact_a = exact_b + first.double() if differences else a.double() + added
    return first, b, bias, exact_a, exact_b


def check_linear(
    cuda,
    rows,
    columns,
    *,
    differences,
    divergence="symmetric_kl",
    gradient="full",
    seed=0,
    biased=True,
    inv_temperature=1.0,
    grad_dtype=torch.float32,
    offset=0,
    in_place=False,
    **changes,
):
    """Loss, d/da and d/da + d/db against the reference in float64; the sum also against its own rounding."""
    first, b, bias, exact_a, exact_b = linear_case(rows, columns, differences, seed=seed, biased=biased)
    weight = 0.5 + torch.rand(1, rows, generator=generator(5))
    weight[0, 1] = 0
    scale = 2.0**12 if grad_dtype == torch.float16 else 0.5
    options = {"divergence": divergence, "inv_temperature": inv_temperature}
    expected, _ = reference_kl.loss(exact_a, exact_b, weight.double(), **options)
    upstream = weight.double() * scale
    wants_sum = gradient == "full"
    da, db = reference_kl.gradient(exact_a, exact_b, upstream, gradient=gradient, **options)
    inputs = surrounded(first, offset), surrounded(b, offset), None if bias is None else surrounded(bias)
    loss, grad_a, grad_sum = on_every_device(
        cuda,
        lambda: cuda.linear_rows(
            *inputs, weight, differences=differences, gradient=gradient, grad_scale=scale, grad_dtype=grad_dtype,
            wants_sum=wants_sum, in_place=in_place, **options,
        ),
        **changes,
    )  # fmt: skip
    # with logits rounded after the bias the value is what fp32 logits allow; differences are exact
    counted = expected >= SMALLEST_NORMAL
    worst = ((loss - expected).abs() / expected)[counted].max().item()
    assert worst <= (4e-6 if columns <= 64 else 2e-6), worst
    assert (loss[weight == 0] == 0).all()
    for side, wanted in ((grad_a, da), *(((grad_sum, da + db),) if wants_sum else ())):
        whole, median = relative_errors(side, wanted)
        # the sum over two classes may pass through zero, with nothing beside it that is larger
        limit = 2e-5 if columns == 2 else 1e-5
        assert whole <= limit + rounding(grad_dtype), whole
        if grad_dtype != torch.float16:
            assert median <= 1e-5 + rounding(grad_dtype), median
    assert (grad_a[weight == 0] == 0).all()
    return loss, grad_a, grad_sum


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [2, 3, 64, 65, 130, 2056])
def test_linear(cuda, columns, divergence, differences):
    check_linear(cuda, 24, columns, differences=differences, divergence=divergence)
    check_linear(cuda, 24, columns, differences=differences, divergence=divergence, biased=False, offset=1)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("columns", [66, 1000])
def test_linear_gradients_of_every_type(cuda, columns, grad_dtype, differences):
    check_linear(cuda, 16, columns, differences=differences, grad_dtype=grad_dtype, inv_temperature=0.5)
    check_linear(cuda, 16, columns, differences=differences, grad_dtype=grad_dtype, divergence="kl", offset=2)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize(("columns", "blocks"), [(20000, 1), (3001, 1), (3001, 2), (3001, 4), (3001, 8)])
def test_linear_in_place(cuda, columns, blocks, differences):
    """Gradients written over the logits are those written elsewhere, staged or not, over a cluster or not."""
    limits = [shared_for(columns, 4, blocks)] if blocks > 1 else [UNSTAGED, 227 * 1024]
    for limit in limits:
        options = {"differences": differences, "capability": 90 if blocks > 1 else 80, "shared_limit": limit, "seed": 3}
        apart = check_linear(cuda, 6, columns, **options)
        together = check_linear(cuda, 6, columns, in_place=True, **options)
        assert cuda.last_cluster() == blocks
        for x, y in zip(apart, together, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("gradient", ["detach_targets", "detach_clean"])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("differences", [False, True])
def test_linear_conventions(cuda, differences, divergence, gradient):
    check_linear(cuda, 16, 300, differences=differences, divergence=divergence, gradient=gradient, seed=4)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize(("columns", "changes"), [
    (3, {}), (129, {}), (2056, {"shared_limit": UNSTAGED}), (2056, {"capability": 90, "shared_limit": 9000}),
])  # fmt: skip
def test_linear_edges(cuda, columns, changes, differences, in_place):
    first, b, bias, _, _ = linear_case(12, columns, differences, seed=6)
    inf, nan = float("inf"), float("nan")
    last = columns - 1
    b[0, 0, last], first[0, 0, last] = -inf, 0 if differences else -inf  # a dead class
    first[0, 1, last] = -inf  # on one side
    first[0, 2, 0], b[0, 3, last], first[0, 4, last], b[0, 5, 0] = nan, nan, inf, inf
    first[0, 6], b[0, 6] = nan, nan  # masked
    first[0, 7] = 0 if differences else b[0, 7]
    exact_b = b.double() + bias.double()
    exact_a = exact_b + first.double() if differences else first.double() + bias.double()
    weight = torch.full((1, 12), 0.25)
    weight[0, 6] = 0
    options = {"divergence": "symmetric_kl", "inv_temperature": 1.0}
    expected, _ = reference_kl.loss(exact_a, exact_b, weight.double(), **options)
    da, db = reference_kl.gradient(exact_a, exact_b, weight.double(), gradient="full", **options)
    inputs = surrounded(first), surrounded(b), surrounded(bias), weight
    loss, grad_a, grad_sum = on_every_device(
        cuda, lambda: cuda.linear_rows(*inputs, differences=differences, in_place=in_place, **options), **changes
    )
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=0, equal_nan=True)
    for side, wanted in ((grad_a, da), (grad_sum, da + db)):
        assert torch.equal(side.isnan(), wanted.isnan())
        rows = ~wanted.isnan().any(-1)
        error, size = (side - wanted)[rows].norm(dim=-1), wanted[rows].norm(dim=-1)
        assert (error <= 1e-4 * size).all(), (error / size).max()
    assert (grad_a[weight == 0] == 0).all()
    assert (grad_sum[weight == 0] == 0).all()


def test_linear_without_gradients_or_sum(cuda):
    first, b, bias, _, _ = linear_case(6, 500, True, seed=9)
    cuda.on(Device())
    options = {"differences": True, "divergence": "symmetric_kl"}
    loss, grad_a, _ = cuda.linear_rows(first, b, bias, **options)
    alone, none, _ = cuda.linear_rows(first, b, bias, grad_dtype=None, **options)
    assert none is None
    assert torch.equal(bits(alone), bits(loss))
    alone, alone_a, none = cuda.linear_rows(first, b, bias, wants_sum=False, **options)
    assert none is None
    assert torch.equal(bits(alone_a), bits(grad_a))
