"""What the row kernels of ``linear_symmetric_kl`` write for what a product with a head's weight gave them."""

import itertools

import oracle
import pytest
import torch
from torch import Tensor

from alum_kernels.ops.dispatch import implementation

COLUMNS = (1, 3, 64, 65, 1000, 2048, 2049, 9000)
PERTURBATIONS = (1e-5, 1e-2, 3.0, 50.0)
EMPTY = torch.empty(0)


def head_products(
    rows: int, columns: int, perturbation: float, *, bias: str | None = None, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(b, a - b, bias) of a head: (1, N, V), (1, N, V), (V,), all fp32. Some of the biases of "closed" are -inf."""
    generator = torch.Generator().manual_seed(seed + columns)
    b = 3 * torch.randn(1, rows, columns, generator=generator)
    difference = perturbation * torch.randn(1, rows, columns, generator=generator)
    added = None
    if bias is not None:
        added = torch.randn(columns, generator=generator)
        if bias == "closed":
            added[1::3] = -torch.inf
        added = added.to(device)
    return b.to(device), difference.to(device), added


def as_first(b: Tensor, difference: Tensor, differences: bool) -> Tensor:
    return difference.clone() if differences else b + difference


def wanted(
    first: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    differences: bool,
    divergence: str,
    gradient: str,
    inv_temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float64 (loss (N,), da (N, V), da + db (N, V)) of those inputs as they are."""
    first, b = first[0].cpu().double(), b[0].cpu().double()
    added = 0.0 if bias is None else bias.cpu().double()
    a, b = (b + first if differences else first) + added, b + added
    temperature = 1 / inv_temperature
    weight = torch.ones(b.shape[0]) if row_weight is None else row_weight[0].cpu()
    loss = torch.where(weight != 0, oracle.divergence(divergence, a, b, temperature), 0)
    da, db = oracle.divergence_gradient(divergence, a, b, weight.double(), gradient, temperature)
    return loss, da, None if gradient != "full" else da + db


def run(
    place,
    first: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    differences: bool,
    divergence: str = "symmetric_kl",
    gradient: str = "full",
    inv_temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    wants: str = "both",
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (N,), da (N, V), da + db (N, V)) of a backend; what is not wanted is empty."""
    first, b = (first.clone(), b.clone()) if in_place else (first, b)
    inputs = first.clone(), b.clone()
    rows = torch.empty(first.shape[:2], device=first.device)
    empty = EMPTY.to(first.device, dtype)
    grad_a = empty if wants == "loss" else first if in_place else torch.empty_like(first, dtype=dtype)
    grad_sum = empty if wants != "both" else b if in_place else torch.empty_like(b, dtype=dtype)
    implementation("linear_symmetric_kl", place.backend).divergence_rows(
        first, b, bias, row_weight, rows, grad_a, grad_sum, differences, divergence, gradient, inv_temperature
    )
    if not in_place:
        assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip((first, b), inputs, strict=True))
    return rows[0], grad_a.reshape(-1, first.shape[-1]), grad_sum.reshape(-1, first.shape[-1])


def l2_error(got: Tensor, want: Tensor) -> float:
    size = float(want.norm())
    error = float((got.cpu().double() - want).norm())
    return error if size == 0 else error / size


def value_bound(columns: int, perturbation: float) -> float:
    return 4e-6 if columns <= 64 or perturbation == 50 else 1e-6


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("differences", [True, False])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_loss_and_gradients(kernel_place, columns, perturbation, differences, divergence):
    """Against float64, without a bias, with one, and with one that closes classes."""
    for bias in (None, "open", "closed"):
        rows = 3 if kernel_place.interpreted else 16
        b, difference, added = head_products(rows, columns, perturbation, bias=bias, device=kernel_place.device)
        first = as_first(b, difference, differences)
        loss, da, total = run(kernel_place, first, b, added, differences=differences, divergence=divergence)
        want, want_a, want_sum = wanted(first, b, added, None, differences, divergence, "full", 1.0)
        if columns == 1:
            assert (loss == 0).all()
            assert (da == 0).all()
            assert (total == 0).all()
            continue
        assert oracle.relative_error(loss, want) <= value_bound(columns, perturbation)
        gradient_bound = 1e-4 if perturbation == 50 else 1e-5
        assert l2_error(da, want_a) <= gradient_bound
        assert l2_error(total, want_sum) <= gradient_bound
        closed = torch.zeros(columns, dtype=torch.bool) if added is None else added.cpu() == -torch.inf
        assert (da.cpu()[:, closed] == 0).all()
        assert (total.cpu()[:, closed] == 0).all()


@pytest.mark.parametrize("columns", [5, 200, 2100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("row_weight", [None, "zeros", "any"])
def test_weights_and_conventions(kernel_place, columns, temperature, row_weight):
    b, difference, bias = head_products(5, columns, 0.1, bias="open", device=kernel_place.device)
    weight = {"zeros": [0.0, 0, 0, 0, 0], "any": [0.25, 0, -1, 3e-3, 0]}.get(row_weight)
    weight = None if weight is None else torch.tensor([weight], device=kernel_place.device)
    cases = [("symmetric_kl", "full"), ("symmetric_kl", "detach_targets"), ("symmetric_kl", "detach_clean"),
             ("kl", "full"), ("kl", "detach_targets")]  # fmt: skip
    for (divergence, gradient), differences in itertools.product(cases, (True, False)):
        first = as_first(b, difference, differences)
        options = {"differences": differences, "divergence": divergence, "gradient": gradient,
                   "inv_temperature": 1 / temperature}  # fmt: skip
        wants = "both" if gradient == "full" else "one"
        loss, da, total = run(kernel_place, first, b, bias, weight, wants=wants, **options)
        want, want_a, want_sum = wanted(first, b, bias, weight, **options)
        torch.testing.assert_close(loss.cpu().double(), want, rtol=value_bound(columns, 0.1), atol=0)
        assert l2_error(da, want_a) <= 1e-5
        silent = torch.zeros(5, dtype=torch.bool) if weight is None else weight[0].cpu() == 0
        assert (da.cpu()[silent] == 0).all()
        if gradient == "full":
            assert l2_error(total, want_sum) <= 1e-5
            assert (total.cpu()[silent] == 0).all()


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("columns", [5, 200, 2100])
def test_what_is_wanted_changes_no_bit(kernel_place, columns, divergence):
    b, difference, bias = head_products(2, columns, 0.1, bias="open", device=kernel_place.device)
    options = {"differences": True, "divergence": divergence}
    loss, da, _ = run(kernel_place, difference, b, bias, **options)
    one = run(kernel_place, difference, b, bias, wants="one", **options)
    assert torch.equal(one[0], loss)
    assert torch.equal(one[1], da)
    alone, _, _ = run(kernel_place, difference, b, bias, wants="loss", **options)
    assert torch.equal(alone, loss)


@pytest.mark.parametrize("divergence", ["symmetric_kl", "kl"])
@pytest.mark.parametrize("differences", [True, False])
@pytest.mark.parametrize("columns", [1, 3, 65, 2048, 9000])
def test_in_place_gives_the_same_bits(kernel_place, columns, differences, divergence):
    """The gradients may lie where the products did: also in a row of several blocks, and in one that is wide."""
    for perturbation in (0.1, 60.0):
        b, difference, bias = head_products(3, columns, perturbation, bias="open", device=kernel_place.device)
        first = as_first(b, difference, differences)
        weight = torch.tensor([[1.0, 0.0, 0.5]], device=kernel_place.device)
        options = {"differences": differences, "divergence": divergence}
        apart = run(kernel_place, first, b, bias, weight, **options)
        assert apart[1].isfinite().all()
        for wants in ("both", "one"):
            together = run(kernel_place, first, b, bias, weight, wants=wants, in_place=True, **options)
            for got, want in zip(together, apart, strict=True):
                assert got.numel() == 0 or torch.equal(got, want)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("differences", [True, False])
@pytest.mark.parametrize("columns", [3, 100, 2100])
def test_nan_and_infinity_spoil_their_row_and_no_other(kernel_place, columns, differences, in_place):
    b, difference, bias = head_products(7, columns, 0.1, bias="open", device=kernel_place.device)
    first = as_first(b, difference, differences)
    options = {"differences": differences, "in_place": in_place}
    clean = run(kernel_place, first, b, bias, **options)
    column = columns - 1
    first[0, 0, column] = torch.nan
    b[0, 1, column] = torch.nan
    first[0, 2, 0] = torch.inf
    b[0, 3, 1] = torch.inf
    first[0, 4, 1] = -torch.inf
    b[0, 5] = first[0, 5] = -torch.inf
    for divergence in ("symmetric_kl", "kl"):
        loss, da, total = run(kernel_place, first, b, bias, divergence=divergence, **options)
        assert loss[:4].isnan().all()
        assert loss[4] == torch.inf
        assert loss[5].isnan()
        assert da[:6].isnan().all()
        assert total[:6].isnan().all()
        if divergence == "symmetric_kl":
            for got, want in zip((loss, da, total), clean, strict=True):
                assert torch.equal(got[6], want[6])
    weight = torch.tensor([[0.0] * 6 + [1.0]], device=kernel_place.device)
    skipped = run(kernel_place, first, b, bias, weight, **options)
    for got, want in zip(skipped, clean, strict=True):
        assert (got[:6] == 0).all()
        assert torch.equal(got[6], want[6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [5, 2100])
def test_gradients_are_rounded_once(kernel_place, columns, dtype):
    b, difference, bias = head_products(4, columns, 0.3, bias="open", device=kernel_place.device)
    if kernel_place == type(kernel_place)("native", "cpu"):
        with pytest.raises(RuntimeError, match="grad_a: expected float32 on the CPU"):
            run(kernel_place, difference, b, bias, differences=True, dtype=dtype)
        return
    for wants in ("both", "one"):
        exact = run(kernel_place, difference, b, bias, differences=True, wants=wants)
        got = run(kernel_place, difference, b, bias, differences=True, wants=wants, dtype=dtype)
        assert torch.equal(got[0], exact[0])
        for narrow, wide in zip(got[1:], exact[1:], strict=True):
            assert narrow.dtype == dtype
            assert torch.equal(narrow, wide.to(dtype))


def test_rows_may_lie_apart(kernel_place):
    """The products of both sides are halves, or columns, of one matrix, and a row weight may be expanded."""
    b, difference, bias = head_products(4, 70, 0.1, bias="open", device=kernel_place.device)
    together = torch.cat((b, difference), -1)
    weight = torch.full((1, 1), 0.5, device=kernel_place.device).expand(1, 4)
    apart = run(kernel_place, together[..., 70:], together[..., :70], bias, weight, differences=True)
    compact = run(kernel_place, difference, b, bias, weight.contiguous(), differences=True)
    for got, want in zip(apart, compact, strict=True):
        assert torch.equal(got, want)


def test_no_rows(kernel_place):
    none = torch.empty(1, 0, 9, device=kernel_place.device)
    loss, da, total = run(kernel_place, none, none, differences=True)
    assert loss.numel() == da.numel() == total.numel() == 0


@pytest.mark.parametrize("gradient", ["detach_targets", "detach_clean"])
def test_a_sum_needs_both_gradients(kernel_place, gradient):
    b, difference, _ = head_products(2, 9, 0.1, device=kernel_place.device)
    with pytest.raises((RuntimeError, ValueError), match="grad_sum: expected none without the gradient of both sides"):
        run(kernel_place, difference, b, differences=True, gradient=gradient)
