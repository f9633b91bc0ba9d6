"""The divergences on CUDA, executed on the CPU: rows short and long, staged or not, alone or over a cluster.

Like test_cuda_kernels_on_host.py: in several orders of the threads, against the reference in float64.
"""

import itertools

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
from alum_kernels.ops.symmetric_kl import GRADIENTS


def check_divergence(
    cuda, a, b, *, divergence, gradient="full", inv_temperature=1.0, value=None, limit=1e-5, **changes
):
    """All three kernels against the reference in float64, at the accuracy that the design demands."""
    columns, rows = a.shape[-1], a.shape[:2]
    value = (4e-6 if columns <= 64 else 1e-6) if value is None else value
    weight = 0.5 + torch.rand(rows, generator=generator(5))
    # the largest values of fp16 gradients stay normal
    weight = weight * 64 if a.dtype == torch.float16 else weight
    options = {"divergence": divergence, "inv_temperature": inv_temperature}
    expected, _ = reference_kl.loss(a.double(), b.double(), None, **options)
    loss, statistics = on_every_device(cuda, lambda: cuda.loss(a, b, **options), **changes)
    counted = expected >= SMALLEST_NORMAL
    assert (loss[~counted].abs() <= SMALLEST_NORMAL).all()
    assert (loss[expected == 0] == 0).all()
    worst = ((loss - expected).abs() / expected)[counted].max().item()
    assert worst <= value, worst

    options["gradient"] = gradient
    exact = reference_kl.gradient(a.double(), b.double(), weight.double(), **options)
    wants_b = exact[1] is not None
    sides = on_every_device(
        cuda, lambda: cuda.gradient(a, b, statistics, weight, wants_b=wants_b, **options), **changes
    )
    both_loss, both_a, both_b = cuda.loss_and_gradient(a, b, weight, wants_b=wants_b, **options)  # on the last device
    assert torch.equal(bits(both_loss), bits(loss))
    of_a, of_b = ((sides[0], exact[0]), (both_a, exact[0])), ((sides[1], exact[1]), (both_b, exact[1]))
    for side, wanted in (*of_a, *(of_b if wants_b else ())):
        whole, median = relative_errors(side, wanted)
        assert whole <= limit + rounding(a.dtype), whole
        if a.dtype != torch.float16:  # whose rows of 1e-6 are subnormal
            assert median <= limit + rounding(a.dtype), median
    return loss, statistics, *sides, both_a, both_b


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2, 3, 64, 65, 127, 129, 1000, 2048, 2056])
def test_divergence(cuda, columns, dtype, divergence):
    a, b = hard_logits(32 if columns <= 129 else 16, columns, dtype)
    check_divergence(cuda, surrounded(a), surrounded(b), divergence=divergence)


@pytest.mark.parametrize("columns", [2, 3])
def test_divergence_of_many_rows_of_few_classes(cuda, columns):
    check_divergence(cuda, *hard_logits(65536, columns), divergence="symmetric_kl")


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(20000, torch.float32), (30522, torch.float32), (50257, torch.bfloat16), (128256, torch.float32)],
)
def test_divergence_of_vocabularies(cuda, columns, dtype):
    check_divergence(cuda, *hard_logits(8, columns, dtype), divergence="symmetric_kl")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [3, 129, 2048])
def test_conventions_and_temperature(cuda, columns, divergence, gradient):
    a, b = hard_logits(16, columns, seed=1)
    options = {"divergence": divergence, "gradient": gradient}
    check_divergence(cuda, a, b, inv_temperature=0.4, **options)
    check_divergence(cuda, a, b, inv_temperature=2.0, **options)


@pytest.mark.parametrize("columns", [2, 64, 65, 1000, 4096])
def test_perturbations_of_fifty(cuda, columns):
    b = 3 * torch.randn(1, 24, columns, generator=generator(2))
    a = b + 50 * torch.randn(1, 24, columns, generator=generator(3))
    for divergence in ("symmetric_kl", "kl"):
        check_divergence(cuda, a, b, divergence=divergence, value=4e-6, limit=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [65, 128, 2056])
def test_staged_rows_are_the_rows_themselves(cuda, columns, dtype):
    a, b = hard_logits(10, columns, dtype, seed=2)
    for divergence in ("symmetric_kl", "kl"):
        staged = check_divergence(cuda, a, b, divergence=divergence)
        unstaged = check_divergence(cuda, a, b, divergence=divergence, shared_limit=UNSTAGED)
        for x, y in zip(staged, unstaged, strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 200])
def test_rows_anywhere_in_memory(cuda, columns, dtype):
    """Slices of a sequence, rows apart by a padded vocabulary, an odd distance or an odd address: none is copied."""
    a, b = (x.view(2, 4, columns) for x in hard_logits(8, columns, dtype, seed=3))
    for outer, pad, offset in ((1, 0, 0), (0, 24, 0), (2, 8, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)):

        def placed(x):
            whole = torch.full((2, 4 + outer, columns + pad), float("nan"), dtype=dtype)  # noqa: B023
            inner = surrounded(whole, offset)[:, :4, :columns]  # noqa: B023
            return inner.copy_(x)

        check_divergence(cuda, placed(a), placed(b), divergence="symmetric_kl")
        check_divergence(cuda, placed(a), b, divergence="symmetric_kl")


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize(
    ("columns", "shared_limit"),
    [*itertools.product((1, 2, 64, 65, 128, 2056), (227 * 1024,)), *itertools.product((65, 128, 2056), (UNSTAGED,))],
)
def test_edges(cuda, columns, divergence, shared_limit):
    """Rows that stand beside each other do not touch each other."""
    check_edges(cuda, columns, divergence, shared_limit=shared_limit)


def check_edges(cuda, columns, divergence, **changes):
    a, b = hard_logits(32, columns, seed=4)
    inf, nan = float("inf"), float("nan")
    last = columns - 1
    a[0, 0, last] = b[0, 0, last] = -inf  # a dead class; the whole row where it is the only one
    a[0, 1, last] = -inf
    b[0, 2, last] = -inf
    a[0, 3, 0], b[0, 4, last], a[0, 5, last], b[0, 6, 0] = nan, nan, inf, inf
    a[0, 7], b[0, 7] = -inf, -inf
    a[0, 8] = b[0, 8] = nan  # masked
    a[0, 9] = b[0, 9]
    a[0, 10, last] = -inf  # masked
    a[0, 11, :-1] = b[0, 11, :-1] = -inf  # one class is left
    weight = torch.full((1, 32), 0.25)
    weight[0, 8] = weight[0, 10] = 0
    options = {"divergence": divergence, "inv_temperature": 1.0}
    expected, _ = reference_kl.loss(a.double(), b.double(), weight.double(), **options)
    exact, exact_b = reference_kl.gradient(a.double(), b.double(), weight.double(), gradient="full", **options)
    loss, statistics = on_every_device(cuda, lambda: cuda.loss(a, b, weight, **options), **changes)
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6 if columns <= 64 else 1e-6, atol=0, equal_nan=True)
    assert (statistics[:, weight == 0] == 0).all()
    options["gradient"] = "full"
    grad_a, grad_b = on_every_device(cuda, lambda: cuda.gradient(a, b, statistics, weight, **options), **changes)
    both_loss, both_a, both_b = on_every_device(
        cuda, lambda: cuda.loss_and_gradient(a, b, weight, wants_b=True, **options), **changes
    )
    assert torch.equal(bits(both_loss), bits(loss))
    for side, wanted in ((grad_a, exact), (grad_b, exact_b), (both_a, exact), (both_b, exact_b)):
        assert torch.equal(side.isnan(), wanted.isnan())
        rows = ~wanted.isnan().any(-1)
        error, size = (side - wanted)[rows].norm(dim=-1), wanted[rows].norm(dim=-1)
        assert (error <= 1e-4 * size).all()
        assert error.norm() <= 1e-5 * size.norm()
    assert (grad_a[weight == 0] == 0).all()
    assert (both_a[weight == 0] == 0).all()
    assert (both_b[weight == 0] == 0).all()


@pytest.mark.parametrize("columns", [3, 127, 2056])
def test_one_side_alone_and_scaled(cuda, columns):
    a, b = (x.to(torch.float16) for x in hard_logits(20, columns, seed=5))
    options = {"divergence": "symmetric_kl", "gradient": "full"}
    weight = torch.rand(20, generator=generator(6)).expand(3, 20)[:1].roll(1, -1)
    cuda.on(Device())
    _, statistics = cuda.loss(a, b, divergence="symmetric_kl")
    grad_a, grad_b = cuda.gradient(a, b, statistics, weight, **options)
    alone_a, none = cuda.gradient(a, b, statistics, weight, wants_b=False, **options)
    assert none is None
    assert torch.equal(bits(alone_a), bits(grad_a))
    none, alone_b = cuda.gradient(a, b, statistics, weight, wants_a=False, **options)
    assert none is None
    assert torch.equal(bits(alone_b), bits(grad_b))
    for scale in (1.0, 0.0):
        _, scaled, none = cuda.loss_and_gradient(a, b, weight, grad_scale=2.0**10 * scale, **options)
        assert none is None
        _, raised, _ = cuda.loss_and_gradient(a, b, weight * 2.0**10, grad_scale=scale, wants_b=True, **options)
        assert torch.equal(bits(scaled), bits(raised))
        assert (scaled == 0).all() == (scale == 0)


# ---- rows over the blocks of a cluster ----


@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize(
    ("columns", "dtype"), [(1000, torch.float32), (2056, torch.bfloat16), (3001, torch.float32), (3003, torch.float16)]
)
def test_divergence_over_a_cluster(cuda, columns, dtype, divergence, blocks):
    a, b = hard_logits(12, columns, dtype, seed=7)
    changes = {"capability": 90, "shared_limit": shared_for(columns, dtype.itemsize, blocks)}
    check_divergence(cuda, surrounded(a), surrounded(b), divergence=divergence, **changes)
    assert cuda.last_cluster() == blocks


@pytest.mark.parametrize("columns", [30522, 128256])
def test_vocabularies_over_a_cluster(cuda, columns):
    changes = {"capability": 90, "multiprocessors": 1}
    check_divergence(cuda, *hard_logits(4, columns), divergence="symmetric_kl", **changes)
    assert cuda.last_cluster() == (4 if columns == 30522 else 8)


def test_few_rows_take_more_blocks(cuda):
    a, b = hard_logits(3, 8200, torch.bfloat16, seed=8)
    for multiprocessors, blocks in ((3, 1), (6, 2), (100, 4)):
        changes = {"capability": 90, "multiprocessors": multiprocessors}
        check_divergence(cuda, a, b, divergence="symmetric_kl", **changes)
        assert cuda.last_cluster() == blocks
    check_divergence(cuda, a, b, divergence="symmetric_kl", capability=89, multiprocessors=100)
    assert cuda.last_cluster() == 1
    # where not even a cluster can stage them
    check_divergence(cuda, a, b, divergence="symmetric_kl", capability=90, multiprocessors=100, shared_limit=UNSTAGED)
    assert cuda.last_cluster() == 4


@pytest.mark.parametrize("blocks", [2, 8])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [65, 129, 2056])
def test_edges_over_a_cluster(cuda, columns, divergence, blocks):
    """Rows that all blocks leave out, or leave early, stand between others; slices may be empty."""
    check_edges(cuda, columns, divergence, capability=90, shared_limit=shared_for(columns, 4, blocks))
