"""``linear_symmetric_kl_grad`` and ``linear_products``: what an ascent needs."""

import pytest
import torch
from linear_operands import FUNCTIONS, error, in_float64, operands

from alum_kernels import (
    linear_products,
    linear_symmetric_kl_grad,
)


@pytest.mark.parametrize("divergence", FUNCTIONS)
def test_the_ascent_has_the_gradient_of_the_adversarial_side_alone(place, divergence):
    given = operands(device=place.device)
    expected = in_float64(given, divergence, gradient="detach_clean", reduction="sum", soft_cap=5.0)
    options = {"divergence": divergence, "reduction": "sum", "soft_cap": 5.0, "backend": place.backend}
    value, gradient = linear_symmetric_kl_grad(*given.values(), **options)
    assert error(value, expected[0]) <= 2e-6
    assert error(gradient, expected[1]["adv_hidden"]) <= 5e-6
    assert not value.requires_grad
    products = linear_products(given["hidden"], given["weight"])
    torch.testing.assert_close(products, given["hidden"] @ given["weight"].T)
    kept_value, kept = linear_symmetric_kl_grad(
        *given.values(), clean_products=products, chunk_bytes=2 * 70 * 8, **options
    )
    before = products.clone()
    strided = products.T.contiguous().T
    again = linear_symmetric_kl_grad(*given.values(), clean_products=strided, chunk_bytes=2 * 70 * 8, **options)
    assert torch.equal(again[1], kept)
    assert error(kept_value, expected[0]) <= 2e-6
    assert error(kept, expected[1]["adv_hidden"]) <= 5e-6
    assert torch.equal(products, before)  # read in every step of an ascent
    assert linear_products(given["hidden"], given["weight"], chunk_bytes=100) is None


@pytest.mark.parametrize(
    ("products", "kind", "message"),
    [
        (torch.zeros(7, 69), ValueError, r"^clean_products: expected shape \(7, 70\), got \(7, 69\)"),
        (torch.zeros(7, 70).double(), TypeError, "^clean_products: expected dtype torch.float32, got torch.float64"),
    ],
)
def test_kept_products_that_do_not_fit(products, kind, message):
    with pytest.raises(kind, match=message):
        linear_symmetric_kl_grad(**operands(), clean_products=products)
    with pytest.raises(ValueError, match=r"^weight: expected shape \(V, 12\) as hidden, got \(70, 11\)"):
        linear_products(torch.zeros(7, 12), torch.zeros(70, 11))


def test_grad_scale_keeps_half_precision_gradients_apart_from_zero(place):
    given = operands(perturbation=2e-3, dtype=torch.float16, device=place.device)
    options = {"reduction": "mean", "backend": place.backend}
    _, plain = linear_symmetric_kl_grad(*given.values(), **options)
    _, scaled = linear_symmetric_kl_grad(*given.values(), grad_scale=2.0**10, **options)
    expected = in_float64(given, "symmetric_kl", gradient="detach_clean")[1]["adv_hidden"] * 2.0**10
    assert plain.dtype == scaled.dtype == torch.float16
    assert error(scaled, expected) <= 2e-3
    assert error(plain * 2.0**10, expected) > error(scaled, expected)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kept_products_of_masked_rows_may_hold_anything(place, value, soft_cap):
    """Also where masked rows go through the products: a captured graph cannot leave them out."""
    given = operands(device=place.device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=place.device)
    options = {"mask": mask, "gather_rows": False, "soft_cap": soft_cap, "backend": place.backend}
    expected = linear_symmetric_kl_grad(**given, **options)
    given["hidden"][mask == 0] = value
    products = linear_products(given["hidden"], given["weight"])
    loss, gradient = linear_symmetric_kl_grad(**given, clean_products=products, **options)
    assert error(loss, expected[0]) <= 2e-6
    assert error(gradient, expected[1]) <= 5e-6
    assert (gradient[mask == 0] == 0).all()
