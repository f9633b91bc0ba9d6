"""How exact the linear divergences are: dtypes, plans of the products, autocast, soft caps, vocabularies."""

import pytest
import torch
from linear_operands import FUNCTIONS, NAMES, assert_close, error, in_float64, operands, under_plan, value_and_gradients

from alum_kernels import (
    linear_symmetric_kl,
    linear_symmetric_kl_grad,
    symmetric_kl,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(place, dtype):
    given = operands(dtype=dtype, device=place.device)
    expected = in_float64(given, "symmetric_kl")
    found = value_and_gradients(given, "symmetric_kl", backend=place.backend)
    assert error(found[0], expected[0]) <= (2e-6 if place.device == "cpu" else 1e-3)
    for name in NAMES:
        assert found[1][name].dtype == dtype
        assert error(found[1][name], expected[1][name]) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["differences", "sides"])
def test_both_plans_of_the_products(kernel_place, plan, dtype):
    """``sides`` is what half precision takes on CUDA: its rounding is emulated here where there is none.

    fp16 keeps a perturbation whose second order it could not hold.
    """
    perturbation = 0.03 if dtype == torch.bfloat16 else 3e-3
    given = operands(rows=32, size=64, columns=700, perturbation=perturbation, spread=0.1, dtype=dtype)
    expected = in_float64(given, "symmetric_kl", reduction="sum")
    moved = {name: tensor.to(kernel_place.device) for name, tensor in given.items()}
    result = under_plan(moved, plan, kernel_place.backend)
    bounds = (1e-5, 1e-5) if plan == "differences" else (1e-3 if dtype == torch.bfloat16 else 3e-3, 3e-3)
    assert error(result.rows.sum(), expected[0]) <= bounds[0]
    for name, bound in (("adv_hidden", bounds[0]), ("hidden", bounds[0]), ("weight", bounds[1]), ("bias", bounds[1])):
        assert error(getattr(result, name), expected[1][name]) <= bound, name


def test_a_class_of_zero_weight_has_a_gradient_under_a_soft_cap(place):
    """As that of the padding token under tied embeddings: both its logits and their difference are zero."""
    given = operands(device=place.device)
    given["weight"][3], given["bias"][3] = 0.0, 0.0
    leaves = {name: tensor.cpu().double().requires_grad_() for name, tensor in given.items()}
    adv_hidden, hidden, weight, bias = leaves.values()
    logits = [3 * torch.tanh((x @ weight.T + bias) / 3) for x in (adv_hidden, hidden)]
    loss = symmetric_kl(*logits)
    loss.backward()
    expected = loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}
    found = value_and_gradients(given, "symmetric_kl", soft_cap=3.0, backend=place.backend)
    assert_close(found, expected)
    assert error(found[1]["weight"][3], expected[1]["weight"][3]) <= 1e-5


@pytest.mark.parametrize("offset", [0.0, 5.0, 8.0])
@pytest.mark.parametrize("divergence", FUNCTIONS)
def test_a_saturated_soft_cap_keeps_its_digits(place, divergence, offset):
    """All logits lie ``offset`` caps out, where tanh is one to the last digit."""
    cap = 2.0
    given = operands(perturbation=1e-2, spread=0.2, device=place.device)
    given["bias"] = given["bias"] * 0.1 + offset * cap
    expected = in_float64(given, divergence, soft_cap=cap)
    found = value_and_gradients(given, divergence, soft_cap=cap, backend=place.backend)
    assert error(found[0] / expected[0].item(), expected[0] / expected[0].item()) <= 1e-5
    for name in NAMES:
        size = expected[1][name].norm().item()
        assert error(found[1][name].double() / size, expected[1][name] / size) <= 2e-5, name


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_an_autocast_around_the_call_chooses_no_product(backend):
    """Its dtype is that of the operands; the logits stay fp32."""
    given = operands(perturbation=1e-3)
    half = {name: tensor.bfloat16() for name, tensor in given.items()}
    expected, _ = in_float64(half, "symmetric_kl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_symmetric_kl(*given.values(), backend=backend)
        value, _ = linear_symmetric_kl_grad(*given.values(), backend=backend)
    assert error(loss, expected) <= 2e-6
    assert error(value, expected) <= 2e-6


def test_autocast_does_what_it_does_to_a_linear_layer():
    given = operands(perturbation=0.3)
    half = {name: tensor.bfloat16() for name, tensor in given.items()}
    expected = value_and_gradients(half, "symmetric_kl")
    mixed = {**given, "hidden": half["hidden"], "adv_hidden": half["adv_hidden"]}
    with pytest.raises(TypeError, match=r"^weight: expected dtype torch.bfloat16 as hidden, got torch.float32 \(under"):
        linear_symmetric_kl(*mixed.values())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in mixed.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_symmetric_kl(*leaves.values())
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), expected[0])
    assert leaves["weight"].grad.dtype == torch.float32
    assert torch.equal(leaves["weight"].grad, expected[1]["weight"].float())


@pytest.mark.parametrize("perturbation", [1e-5, 1e-3, 0.1])
def test_accuracy_at_a_vocabulary(compiled_place, perturbation):
    """fp32, over 30,522 words: value 1e-6 and gradients 1e-5, where two logits lose three digits more."""
    given = operands(8, 96, 30522, perturbation, spread=0.3, device=compiled_place.device)
    expected = in_float64(given, "symmetric_kl")
    found = value_and_gradients(given, "symmetric_kl", backend=compiled_place.backend)
    assert error(found[0], expected[0]) <= 1e-6
    for name in NAMES:
        assert error(found[1][name], expected[1][name]) <= 1e-5, name


@pytest.mark.parametrize("perturbation", [0.1, 0.03, 0.01])
@pytest.mark.parametrize("plan", ["differences", "sides"])
def test_accuracy_of_bfloat16_hidden_states(compiled_place, plan, perturbation):
    """Value 1e-3, hidden gradients 1e-3, weight gradient 3e-3, before they are rounded to bf16."""
    if compiled_place.backend == "reference":
        pytest.skip("it has one plan, and is the oracle")
    given = operands(48, 768, 32000, perturbation, spread=0.02, dtype=torch.bfloat16)
    expected = in_float64(given, "symmetric_kl", reduction="sum")
    moved = {name: tensor.to(compiled_place.device) for name, tensor in given.items()}
    result = under_plan(moved, plan, compiled_place.backend)
    assert error(result.rows.sum(), expected[0]) <= 1e-3
    assert error(result.adv_hidden, expected[1]["adv_hidden"]) <= 1e-3
    assert error(result.hidden, expected[1]["hidden"]) <= 1e-3
    assert error(result.weight, expected[1]["weight"]) <= 3e-3


def test_a_default_dtype_of_float64_changes_nothing(kernel_place):
    given = operands(device=kernel_place.device)
    expected = value_and_gradients(given, "symmetric_kl", soft_cap=4.0, backend=kernel_place.backend)
    torch.set_default_dtype(torch.float64)
    try:
        found = value_and_gradients(given, "symmetric_kl", soft_cap=4.0, backend=kernel_place.backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in NAMES)
