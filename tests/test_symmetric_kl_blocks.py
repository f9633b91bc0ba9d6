"""Long rows whose parts disagree: what holds of a row read block by block until a later block has a larger class."""

import oracle
import pytest
import torch
from torch import Tensor

from alum_kernels import kl, symmetric_kl

DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl}
COLUMNS, EARLY, LATE = 8500, 7, 8200
"""Classes, one of the first 8192, and one that comes after them."""
STORED = 2.0**-24


def flat_pair(perturbation: float, device: str) -> tuple[Tensor, Tensor]:
    return oracle.logit_pair(2, COLUMNS, perturbation, scale=0.1, device=device)


def assert_right(place, a: Tensor, b: Tensor, *, loss: float = 4e-6, gradient: float = 1e-5) -> None:
    """The loss of each row and both gradients as a whole, within relative errors."""
    for name, divergence in DIVERGENCES.items():
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        rows = divergence(x, y, reduction="none", backend=place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b)) <= loss
        for got, want in zip(
            torch.autograd.grad(rows.sum(), (x, y)), oracle.divergence_gradient(name, a, b), strict=True
        ):
            assert oracle.gradient_errors(got, want)[0] <= gradient


@pytest.mark.parametrize("rise", [5.0, 29.0, 31.0])
def test_class_from_a_part_without_weight_that_overtakes_all_others(place, rise):
    """The first block's clean weights vanish against the second's, and one of its adversarial ones does not."""
    a, b = flat_pair(1e-3, place.device)
    a[:, :8192] -= 100
    b[:, :8192] -= 100
    a[:, EARLY], b[:, EARLY] = rise, -100
    assert_right(place, a, b, gradient=1e-5 + 4 * STORED * 100)


@pytest.mark.parametrize("move", [5.0, 25.0, -5.0, -25.0, -40.0])
def test_largest_class_of_a_part_that_moves_far_from_all_others(place, move):
    """Counted from that class all others move alike; a larger one, which stays, comes later."""
    a, b = flat_pair(1e-3, place.device)
    b[:, EARLY], b[:, LATE] = 1.0, 1.5
    a[:, EARLY], a[:, LATE] = 1.0 + move, 1.5
    assert_right(place, a, b)


@pytest.mark.parametrize("low", [50.0, 80.0])
@pytest.mark.parametrize("perturbation", [1e-3, 1e-5])
def test_part_on_which_a_side_is_far_below_the_other(place, perturbation, low):
    """Both sides of it weigh next to nothing in the row, of which no more than a small change is left."""
    a, b = flat_pair(perturbation, place.device)
    a[:, :8192] -= low
    b[:, :8192] -= low
    a[:, EARLY], b[:, EARLY] = 35 - low, -20 - low
    assert_right(place, a, b)


@pytest.mark.parametrize("step", [0.5, 20.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_largest_class_that_rises_from_part_to_part(place, step, temperature):
    """Four blocks, each above the one before; the differences of their largest classes are spread over 20."""
    a, b = oracle.logit_pair(1, 4 * 8192 - 100, 1e-2, scale=0.1, device=place.device)
    for block, difference in enumerate((0.0, 9.0, -11.0, 0.1)):
        part = slice(8192 * block, 8192 * (block + 1))
        a[:, part] += step * block
        b[:, part] += step * block
        b[:, part.start + 50] += 1
        a[:, part.start + 50] = b[:, part.start + 50] + difference
    for name, divergence in DIVERGENCES.items():
        rows = divergence(a, b, temperature=temperature, reduction="none", backend=place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b, temperature)) <= 4e-6
