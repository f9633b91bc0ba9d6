"""``linear_symmetric_kl`` and ``linear_kl``: against float64 in every convention, chunk by chunk; what they refuse."""

import pytest
import torch
from linear_operands import FUNCTIONS, NAMES, assert_close, error, in_float64, operands, value_and_gradients
from torch import Tensor

from alum_kernels import (
    BackendUnavailableError,
    linear_symmetric_kl,
    symmetric_kl,
)
from alum_kernels.backends.linear_chunks import LinearDivergence, LinearOptions, Wanted, rows_in_chunk
from alum_kernels.ops.reductions import REDUCTIONS
from alum_kernels.ops.symmetric_kl import GRADIENTS
from benchmarks.timing import peak_memory


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", FUNCTIONS)
def test_values_and_gradients(place, divergence, gradient, masked):
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1], device=place.device) if masked else None
    for perturbation, soft_cap, logit_scale in ((1e-5, None, 1.0), (0.1, 4.0, 0.5), (2.0, None, 0.5)):
        given = operands(perturbation=perturbation, device=place.device)
        options = {"gradient": gradient, "soft_cap": soft_cap, "logit_scale": logit_scale, "temperature": 0.7}
        expected = in_float64(given, divergence, mask=None if mask is None else mask.cpu(), upstream=-3.0, **options)
        found = value_and_gradients(
            given, divergence, mask=mask, upstream=-3.0, chunk_bytes=3 * 70 * 8, backend=place.backend, **options
        )
        assert found[0].dtype == torch.float32
        assert_close(found, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("divergence", FUNCTIONS)
def test_the_reference_is_the_divergence_of_the_logits(divergence, gradient):
    """In float64 two logits lose nothing that matters: the same number by another way."""
    from alum_kernels import kl

    given = operands(dtype=torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    adv_hidden, hidden, weight, bias = leaves.values()
    logits = hidden @ weight.T + bias
    logits = logits.detach() if gradient == "detach_clean" else logits
    plain = {"symmetric_kl": symmetric_kl, "kl": kl}[divergence]
    loss = plain(adv_hidden @ weight.T + bias, logits, gradient=gradient)
    loss.backward()
    expected = loss.detach(), {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    assert_close(in_float64(given, divergence, gradient=gradient), expected, value=1e-12, gradient=1e-12)


@pytest.mark.parametrize("divergence", FUNCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(place, reduction, masked, divergence):
    given = {n: x.view(2, 3, -1) if "hidden" in n else x for n, x in operands(rows=6, device=place.device).items()}
    mask = torch.tensor([[True, False, True], [False, True, True]], device=place.device) if masked else None
    expected = in_float64(given, divergence, mask=None if mask is None else mask.cpu(), reduction=reduction)
    found = value_and_gradients(given, divergence, mask=mask, reduction=reduction, backend=place.backend)
    assert found[0].shape == ((2, 3) if reduction == "none" else ())
    assert_close(found, expected)
    kept = value_and_gradients(
        given, divergence, mask=mask, reduction=reduction, gather_rows=False, backend=place.backend
    )
    assert_close(kept, expected)


def test_masked_rows_count_nowhere_whatever_they_hold(place):
    given = operands(rows=4, device=place.device)
    mask = torch.tensor([1, 1, 0, 1], device=place.device)
    clean = value_and_gradients(given, "symmetric_kl", mask=mask, backend=place.backend)
    spoilt = {**given, "hidden": given["hidden"].clone(), "adv_hidden": given["adv_hidden"].clone()}
    spoilt["hidden"][2], spoilt["adv_hidden"][2] = float("nan"), float("inf")
    for gather_rows in (True, False):
        found = value_and_gradients(spoilt, "symmetric_kl", mask=mask, gather_rows=gather_rows, backend=place.backend)
        assert_close(found, clean, value=0 if gather_rows else 1e-7, gradient=0 if gather_rows else 1e-6)
        assert (found[1]["hidden"][2] == 0).all()
        assert (found[1]["adv_hidden"][2] == 0).all()


def test_without_a_graph_no_gradient_is_formed(kernel_place, monkeypatch):
    wanted = []

    class Seen(LinearDivergence):
        def __init__(self, *arguments, **keywords) -> None:
            super().__init__(*arguments, **keywords)
            wanted.append(self.wanted)

    monkeypatch.setattr("alum_kernels.ops.linear_symmetric_kl.LinearDivergence", Seen)
    leaves = [tensor.requires_grad_() for tensor in operands(device=kernel_place.device).values()]
    with torch.no_grad():
        linear_symmetric_kl(*leaves, backend=kernel_place.backend)
    linear_symmetric_kl(*leaves, backend=kernel_place.backend)
    assert wanted == [Wanted(), Wanted(True, True, True, True)]


def test_without_bias_and_with_few_gradients(place):
    given = operands(device=place.device)
    expected = in_float64({n: x for n, x in given.items() if n != "bias"}, "symmetric_kl")
    for wanted in NAMES[:3]:
        leaves = {n: given[n].clone().requires_grad_(n == wanted) for n in NAMES[:3]}
        linear_symmetric_kl(*leaves.values(), backend=place.backend).backward()
        assert error(leaves[wanted].grad, expected[1][wanted]) <= 5e-6
    with torch.no_grad():
        value = linear_symmetric_kl(*(given[n] for n in NAMES[:3]), backend=place.backend)
    assert error(value, expected[0]) <= 2e-6
    assert not value.requires_grad


def test_tied_weights_receive_both_gradients(place):
    """The head's weight is also what the hidden states were made from, as with tied embeddings."""
    given = operands(rows=5, columns=70, device=place.device)
    indices = torch.tensor([3, 1, 4, 1, 5], device=place.device)
    noise = given["adv_hidden"] - given["hidden"]

    def gradient(weight: Tensor, backend: str) -> Tensor:
        weight = weight.clone().requires_grad_()
        hidden = torch.tanh(weight[indices])
        linear_symmetric_kl(hidden + noise.to(weight), hidden, weight, backend=backend).backward()
        return weight.grad

    exact = gradient(given["weight"].double(), "reference")
    assert error(gradient(given["weight"], place.backend), exact.cpu()) <= 5e-6


def test_a_result_may_be_used_twice_and_kept(place):
    given = operands(device=place.device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    loss = linear_symmetric_kl(*leaves.values(), backend=place.backend)
    once = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
    scaled = torch.autograd.grad(
        loss * 0.25 + loss * loss.detach() / loss.detach() * 0.25, leaves.values(), retain_graph=True
    )
    again = torch.autograd.grad(loss, leaves.values())
    for first, half, last in zip(once, scaled, again, strict=True):
        assert torch.equal(first, last)
        torch.testing.assert_close(half, first / 2, rtol=3e-7, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_a_checkpoint(place, reduction):
    given = operands(device=place.device)
    _, expected = value_and_gradients(given, "symmetric_kl", reduction=reduction, backend=place.backend)
    leaves = [tensor.clone().requires_grad_() for tensor in given.values()]

    def segment(*tensors: Tensor) -> Tensor:
        return linear_symmetric_kl(*tensors, reduction=reduction, backend=place.backend).sum()

    torch.utils.checkpoint.checkpoint(segment, *leaves, use_reentrant=False).backward()
    for leaf, name in zip(leaves, NAMES, strict=True):
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-6, atol=0)


def test_exports_with_a_dynamic_number_of_rows():
    weight = operands()["weight"]

    class Loss(torch.nn.Module):
        def forward(self, adv_hidden: Tensor, hidden: Tensor) -> Tensor:
            return linear_symmetric_kl(adv_hidden, hidden, weight) + symmetric_kl(adv_hidden, hidden)

    rows = torch.export.Dim("rows")
    example = operands(rows=5)
    shapes = {"adv_hidden": {0: rows}, "hidden": {0: rows}}
    exported = torch.export.export(Loss(), (example["adv_hidden"], example["hidden"]), dynamic_shapes=shapes)
    given = operands(rows=9)
    pair = given["adv_hidden"], given["hidden"]
    torch.testing.assert_close(exported.module()(*pair), Loss()(*pair), rtol=1e-6, atol=0)


def test_second_derivatives(place):
    given = operands(rows=3, size=4, columns=6, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in given.values()]
    if place.backend == "reference":
        assert torch.autograd.gradcheck(lambda *x: linear_symmetric_kl(*x, soft_cap=3.0), leaves)
        assert torch.autograd.gradgradcheck(lambda *x: linear_symmetric_kl(*x), leaves)
        return
    leaves = [tensor.detach().float().to(place.device).requires_grad_() for tensor in leaves]
    for reduction in ("mean", "none"):
        loss = linear_symmetric_kl(*leaves, reduction=reduction, backend=place.backend).sum()
        (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad.sum().backward()
    upstream = torch.ones(3, device=place.device, requires_grad=True)
    rows = linear_symmetric_kl(*leaves, reduction="none", backend=place.backend)
    (grad,) = torch.autograd.grad((rows * upstream).sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(grad.sum(), upstream)


def test_chunks_change_rounding_only_and_the_same_chunks_nothing(kernel_place):
    given = operands(rows=11, device=kernel_place.device)
    options = {"backend": kernel_place.backend}
    whole = value_and_gradients(given, "symmetric_kl", **options)
    for rows in (1, 2, 5, 11):
        chunked = value_and_gradients(given, "symmetric_kl", chunk_bytes=rows * 70 * 8, **options)
        assert_close(chunked, whole, value=3e-7, gradient=3e-6)
        for _ in range(2):
            again = value_and_gradients(given, "symmetric_kl", chunk_bytes=rows * 70 * 8, **options)
            assert torch.equal(again[0], chunked[0])
            assert all(torch.equal(again[1][name], chunked[1][name]) for name in NAMES)


def test_memory_does_not_grow_with_rows_times_classes(kernel_place):
    """Peaks as the allocator counts them: beyond results and hidden states, a chunk, whatever the number of rows."""
    if kernel_place.interpreted:
        pytest.skip("the interpreter's memory is numpy's")
    columns, size, budget, peaks = 4000, 8, 1 << 20, []
    device = torch.device(kernel_place.device)
    for rows in (256, 1024):
        leaves = [tensor.requires_grad_() for tensor in operands(rows, size, columns, device=device).values()]

        def call(leaves=leaves) -> object:
            loss = linear_symmetric_kl(*leaves, chunk_bytes=budget, backend=kernel_place.backend)
            return torch.autograd.grad(loss, leaves)

        call()
        peaks.append(peak_memory(call, device))
    results = 4 * (2 * columns * (size + 1) + 4 * 1024 * size)
    assert peaks[1] <= 1.1 * budget + 2 * results
    assert peaks[1] - peaks[0] <= 0.02 * 4 * (1024 - 256) * columns


def test_the_budget_of_a_chunk(monkeypatch):
    device, options = torch.device("cpu"), LinearOptions("symmetric_kl", "full")
    assert rows_in_chunk(100, 1000, options, device, 4) == 100
    assert rows_in_chunk(100, 1000, LinearOptions("symmetric_kl", "full", chunk_bytes=50 * 8000), device, 4) == 50
    assert rows_in_chunk(100, 1000, LinearOptions("symmetric_kl", "full", chunk_bytes=1), device, 4) == 1
    assert rows_in_chunk(0, 1000, options, device, 4) == 1
    # halves need room for gradients beside the fp32 logits; chunks are even
    assert rows_in_chunk(100, 1000, LinearOptions("symmetric_kl", "full", chunk_bytes=99 * 12000), device, 2) == 50
    monkeypatch.setenv("ALUM_LINEAR_CHUNK_BYTES", str(25 * 8000))
    assert rows_in_chunk(100, 1000, options, device, 4) == 25
    monkeypatch.setenv("ALUM_LINEAR_CHUNK_BYTES", "64MB")
    with pytest.raises(ValueError, match="ALUM_LINEAR_CHUNK_BYTES: expected a number of bytes > 0, got '64MB'"):
        linear_symmetric_kl(*operands().values(), backend="native")


def test_no_rows_and_one_class(place):
    given = operands(rows=0, device=place.device)
    loss, grads = value_and_gradients(given, "symmetric_kl", backend=place.backend)
    assert loss.item() == 0
    assert all((grads[name] == 0).all() for name in NAMES)
    given = operands(rows=3, device=place.device)
    nothing = torch.zeros(3, dtype=torch.bool, device=place.device)
    for gather in (True, False):
        loss, grads = value_and_gradients(
            given, "symmetric_kl", mask=nothing, gather_rows=gather, backend=place.backend
        )
        assert loss.item() == 0
        assert all((grads[name] == 0).all() for name in NAMES)
    given = operands(columns=1, device=place.device)
    loss, grads = value_and_gradients(given, "symmetric_kl", backend=place.backend)
    assert loss.item() == 0
    assert all((grads[name] == 0).all() for name in NAMES)


def test_a_spoilt_row_spoils_no_other(place):
    given = operands(rows=4, device=place.device)
    given["hidden"][1, 2] = float("inf")
    rows = linear_symmetric_kl(*given.values(), reduction="none", backend=place.backend)
    assert rows.isnan().tolist() == [False, True, False, False]
    kept = [0, 2, 3]
    expected, _ = in_float64(
        {n: x[kept] if "hidden" in n else x for n, x in given.items()}, "symmetric_kl", reduction="none"
    )
    assert error(rows[kept], expected) <= 2e-6


def test_classes_switched_off_by_their_bias(place):
    given = operands(device=place.device)
    given["bias"][5], given["bias"][69] = -float("inf"), -float("inf")
    alive = [v for v in range(70) if v not in (5, 69)]
    fewer = {n: x[alive] if n in ("weight", "bias") else x for n, x in given.items()}
    expected = in_float64(fewer, "symmetric_kl")
    found = value_and_gradients(given, "symmetric_kl", backend=place.backend)
    assert error(found[0], expected[0]) <= 2e-6
    assert error(found[1]["adv_hidden"], expected[1]["adv_hidden"]) <= 5e-6
    assert error(found[1]["weight"][alive], expected[1]["weight"]) <= 5e-6
    assert (found[1]["weight"][5] == 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(kernel_place, dynamic):
    if kernel_place.interpreted:
        pytest.skip("the interpreter does not trace")

    def step(*leaves):
        return linear_symmetric_kl(*leaves, mask=mask, reduction=reduction, backend=kernel_place.backend)

    for reduction in ("mean", "none"):  # noqa: B007
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
        for rows in (7, 9):
            given = operands(rows=rows, device=kernel_place.device)
            mask = (torch.arange(rows, device=kernel_place.device) % 3) != 0
            results = []
            for function in (step, compiled):
                leaves = [tensor.clone().requires_grad_() for tensor in given.values()]
                loss = function(*leaves)
                loss.sum().backward()
                results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager, rtol=1e-6, atol=0)


def test_opcheck(kernel_place):
    given = operands(rows=5, size=4, columns=9, device=kernel_place.device)
    weight = torch.tensor([0.5, 0.0, 1.0, 0.25, 1.0], device=kernel_place.device)
    for wanted, soft_cap, row_weight, masked in (
        ([True, True, True, True], None, weight, "gather"),
        ([True, False, False, False], 3.0, None, "none"),
        ([False, False, False, False], None, weight, "keep"),
    ):
        torch.library.opcheck(
            torch.ops.alum_kernels.linear_symmetric_kl.default,
            (*given.values(), row_weight, None, "symmetric_kl", "full", 1.0, 1.0, soft_cap, masked, None, wanted,
             kernel_place.backend),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden": torch.zeros(7, 11)}, ValueError, r"^hidden: expected shape \(7, 12\) as adv_hidden, got \(7, 11\)"),
        ({"weight": torch.zeros(70, 11)}, ValueError, r"^weight: expected shape \(V, 12\) as hidden, got \(70, 11\)"),
        ({"weight": torch.zeros(12)}, ValueError, r"^weight: expected 2 dimensions \(V, H\), got shape \(12,\)"),
        ({"weight": torch.zeros(0, 12)}, ValueError, "^weight: expected at least one class and one feature"),
        ({"bias": torch.zeros(69)}, ValueError, r"^bias: expected shape \(70,\), got \(69,\)"),
        (
            {"bias": torch.zeros(70).double()},
            TypeError,
            "^bias: expected dtype torch.float32 as hidden, got torch.float64",
        ),
        (
            {"adv_hidden": torch.zeros(12), "hidden": torch.zeros(12)},
            ValueError,
            r"^adv_hidden: expected shape \(..., H\)",
        ),
        ({"adv_hidden": [1.0]}, TypeError, "^adv_hidden: expected a tensor, got list"),
        ({"weight": [1.0]}, TypeError, "^weight: expected a tensor, got list"),
        ({"mask": torch.ones(6)}, TypeError, "^mask: expected bool or integers"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"^mask: expected shape \(7,\), got \(6,\)"),
        ({"reduction": "total"}, ValueError, "^reduction: expected one of 'mean'"),
        ({"gradient": "none"}, ValueError, "^gradient: expected one of 'full'"),
        ({"temperature": 0.0}, ValueError, "^temperature: expected a number > 0"),
        ({"soft_cap": 0.0}, ValueError, "^soft_cap: expected a number > 0 or None"),
        ({"chunk_bytes": 0}, ValueError, "^chunk_bytes: expected a number > 0, got 0"),
        ({"chunk_bytes": 1.5}, TypeError, "^chunk_bytes: expected an int or None, got float"),
        ({"backend": "cublas"}, ValueError, "^backend: expected one of"),
    ],
)
def test_wrong_arguments(changes, kind, message):
    with pytest.raises(kind, match=message):
        linear_symmetric_kl(**{**operands(), **changes})


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(BackendUnavailableError, match="float64 is served by the reference backend only"):
        linear_symmetric_kl(**operands(dtype=torch.float64), backend="native")
