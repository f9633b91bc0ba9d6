"""What ``symmetric_kl`` and its relatives compute, for every argument and on every backend."""

import contextlib
import gc
from collections.abc import Iterator

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alum_kernels import js, kl, squared_hellinger, symmetric_kl, symmetric_kl_grad
from alum_kernels.ops.reductions import REDUCTIONS
from alum_kernels.ops.symmetric_kl import GRADIENTS

DIVERGENCES = {"symmetric_kl": symmetric_kl, "kl": kl, "js": js, "squared_hellinger": squared_hellinger}
HALF_PLACE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SEVERAL_COLUMNS = (1, 5, 64, 65, 130)


def names(place) -> tuple[str, ...]:
    return tuple(DIVERGENCES) if place.backend == "reference" else ("symmetric_kl", "kl")


def value_bound(columns: int) -> float:
    return 4e-6 if columns <= 64 else 1e-6


def assert_gradient(got: Tensor | None, want: Tensor, dtype: torch.dtype) -> None:
    """As accurate as in fp32, then rounded once."""
    assert got is not None
    assert got.dtype == dtype
    got, want = got.detach().cpu().double().flatten(0, -2), want.flatten(0, -2)
    floor = oracle.SMALLEST[dtype]
    error = ((got - want).abs() - HALF_PLACE[dtype] * want.abs() - floor).clamp(min=0)
    assert float(error.norm()) <= 1e-5 * float(want.norm())


def weights(mask: Tensor | None, reduction: str, shape: torch.Size) -> Tensor:
    """(...) float64 weight of each row in the reduced loss, by the definition."""
    kept = torch.ones(shape, dtype=torch.float64) if mask is None else (mask.cpu() != 0).double()
    if reduction == "mean":
        return kept / kept.sum().clamp(min=1)
    return kept / shape[0] if reduction == "batchmean" else kept


@pytest.mark.parametrize("dtype", list(HALF_PLACE))
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("columns", SEVERAL_COLUMNS)
def test_gradient_conventions(place, columns, gradient, dtype):
    a, b = oracle.logit_pair(5, columns, 0.3, dtype=dtype, device=place.device)
    upstream = torch.randn(5, generator=torch.Generator().manual_seed(1)).to(place.device)
    upstream[2] = 0
    for name in names(place):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        rows = DIVERGENCES[name](x, y, gradient=gradient, reduction="none", backend=place.backend)
        assert rows.dtype == torch.float32
        rows.backward(upstream)
        da, db = oracle.divergence_gradient(name, a, b, upstream.cpu().double(), gradient)
        assert_gradient(x.grad, da, dtype)
        if gradient == "detach_clean":
            assert y.grad is None
        else:
            assert_gradient(y.grad, db, dtype)
        if columns > 1:
            assert oracle.relative_error(rows, oracle.divergence(name, a, b)) <= value_bound(columns)


def test_conventions_by_their_definition():
    """detach_targets is what backward gives where the weights of each one-sided KL are constants."""
    a, b = (t.double().requires_grad_() for t in oracle.logit_pair(6, 9, 1.0))
    p, q = a.softmax(-1), b.softmax(-1)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    definitions = {
        ("symmetric_kl", "full"): ((p - q) * (log_p - log_q)).sum(),
        ("symmetric_kl", "detach_targets"): -(p.detach() * log_q + q.detach() * log_p).sum(),
        ("kl", "full"): (q * (log_q - log_p)).sum(),
        ("kl", "detach_targets"): -(q.detach() * log_p).sum(),
    }
    log_m = torch.log((p + q) / 2)
    for convention in ("full", "detach_targets"):  # which have no target side
        definitions["js", convention] = (p * (log_p - log_m) + q * (log_q - log_m)).sum() / 2
        definitions["squared_hellinger", convention] = ((p.sqrt() - q.sqrt()) ** 2).sum() / 2
    for (name, gradient), loss in definitions.items():
        want = torch.autograd.grad(loss, (a, b), retain_graph=True, allow_unused=True)
        got = torch.autograd.grad(
            DIVERGENCES[name](a, b, gradient=gradient, reduction="sum", backend="reference"), (a, b)
        )
        for side, other in zip(got, want, strict=True):
            torch.testing.assert_close(side, torch.zeros_like(a) if other is None else other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("only", ["a", "b"])
@pytest.mark.parametrize("columns", [3, 130])
def test_one_side_alone(place, columns, only):
    a, b = oracle.logit_pair(4, columns, 0.3, device=place.device)
    side = {"a": a, "b": b}[only].requires_grad_()
    symmetric_kl(a, b, reduction="sum", backend=place.backend).backward()
    assert_gradient(side.grad, oracle.divergence_gradient("symmetric_kl", a, b)["ab".index(only)], torch.float32)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("columns", [4, 70])
def test_reductions_and_masks(place, columns, reduction, mask_dtype):
    a, b = (t.view(3, 4, columns) for t in oracle.logit_pair(12, columns, 0.3, device=place.device))
    mask = None
    if mask_dtype is not None:
        mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], device=place.device).to(mask_dtype)
        a[mask == 0], b[mask == 0] = float("nan"), float("inf")
    a.requires_grad_()
    weight = weights(mask, reduction, a.shape[:-1])
    for name in names(place):
        a.grad = None
        got = DIVERGENCES[name](a, b, mask=mask, reduction=reduction, backend=place.backend)
        rows = oracle.divergence(name, a.flatten(0, 1), b.flatten(0, 1)).view(3, 4)
        rows = torch.where(weight != 0, rows, 0)
        want = rows if reduction == "none" else (rows * weight).sum()
        torch.testing.assert_close(got.detach().cpu().double(), want, rtol=value_bound(columns), atol=0)
        got.sum().backward()
        da, _ = oracle.divergence_gradient(name, a.flatten(0, 1), b.flatten(0, 1), weight.flatten())
        assert_gradient(a.grad, da.view_as(a), torch.float32)
        assert (a.grad[(weight == 0)] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("columns", [5, 64, 130])
def test_temperature(place, columns, temperature):
    a, b = (t.requires_grad_() for t in oracle.logit_pair(6, columns, 0.3, device=place.device))
    for name in names(place):
        a.grad = b.grad = None
        rows = DIVERGENCES[name](a, b, temperature=temperature, reduction="none", backend=place.backend)
        assert oracle.relative_error(rows, oracle.divergence(name, a, b, temperature)) <= value_bound(columns)
        rows.sum().backward()
        for side, want in zip((a, b), oracle.divergence_gradient(name, a, b, temperature=temperature), strict=True):
            assert_gradient(side.grad, want, torch.float32)


def layouts(columns: int, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of (..., V) logits that lie in memory in every way a model may leave them."""
    a, b = oracle.logit_pair(24, columns, 0.3, device=device)
    a, b = a.view(2, 3, 4, columns), b.view(2, 3, 4, columns)
    return {
        "2d": (a[0, 0], b[0, 0]),
        "3d": (a[0], b[0]),
        "4d": (a, b),
        "shifted": (a[0][:, :-1], b[0][:, 1:]),
        "transposed rows": (a[0].transpose(0, 1), b[0].transpose(0, 1)),
        "transposed 4d": (a.transpose(0, 2), b.transpose(0, 2)),
        "strided columns": (torch.stack((a[0], a[0]), -1)[..., 0], b[0]),
        "columns first": (a[0].permute(2, 0, 1).contiguous().permute(1, 2, 0), b[0]),
        "sliced columns": (torch.cat((a[0], b[0]), -1)[..., :columns], b[0]),
        "expanded rows": (a[0], b[0, :1].expand(3, 4, columns)),
        "one row": (a[0, 0, :1], b[0, 0, :1]),
    }


@pytest.mark.parametrize("columns", [5, 70])
@pytest.mark.parametrize("layout", layouts(2, "cpu"))
def test_any_layout(place, layout, columns):
    a, b = (t.detach().requires_grad_() for t in layouts(columns, place.device)[layout])
    strides = a.stride(), b.stride()
    rows = symmetric_kl(a, b, reduction="none", backend=place.backend)
    assert rows.shape == a.shape[:-1]
    flat = a.detach().reshape(-1, columns), b.detach().reshape(-1, columns)
    assert oracle.relative_error(rows.flatten(), oracle.divergence("symmetric_kl", *flat)) <= value_bound(columns)
    rows.sum().backward()
    for side, want in zip((a, b), oracle.divergence_gradient("symmetric_kl", *flat), strict=True):
        assert_gradient(side.grad, want.view(a.shape), torch.float32)
    assert strides == (a.stride(), b.stride())


@pytest.mark.parametrize(
    ("columns", "masked", "dtype"),
    [(3, True, torch.float32), (3, False, torch.float16), (70, False, torch.float32), (70, True, torch.bfloat16)],
)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradient_agree_with_autograd(place, reduction, gradient, columns, masked, dtype):
    a, b = (t.view(2, 3, columns) for t in oracle.logit_pair(6, columns, 0.3, dtype=dtype, device=place.device))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=place.device) if masked else None
    options = {"mask": mask, "reduction": reduction, "gradient": gradient, "backend": place.backend}
    weight = weights(mask, reduction, a.shape[:-1]).flatten()
    for name in names(place):
        x = a.clone().requires_grad_()
        loss = DIVERGENCES[name](x, b, **options)
        loss.sum().backward()
        got, da = symmetric_kl_grad(x, b.clone().requires_grad_(), divergence=name, **options)
        assert not got.requires_grad
        assert not da.requires_grad
        assert da.shape == a.shape
        torch.testing.assert_close(got, loss.detach(), rtol=2 * value_bound(columns), atol=0)
        want, want_b = oracle.divergence_gradient(name, a.flatten(0, 1), b.flatten(0, 1), weight, gradient)
        assert_gradient(da, want.view_as(a), dtype)
        assert_gradient(x.grad, want.view_as(a), dtype)
        same, both_a, both_b = symmetric_kl_grad(x, b, divergence=name, clean_gradient=True, **options)
        assert torch.equal(same, got)
        assert torch.equal(both_a, da)
        assert_gradient(both_b, torch.zeros_like(a) if want_b is None else want_b.view_as(b), dtype)


def test_grad_scale_keeps_half_precision_gradients_apart_from_zero(place):
    a, b = oracle.logit_pair(4, 9, 1e-3, dtype=torch.float16, device=place.device)
    scale = 2.0**12
    _, plain = symmetric_kl_grad(a, b, reduction="mean", backend=place.backend)
    _, scaled = symmetric_kl_grad(a, b, reduction="mean", grad_scale=scale, backend=place.backend)
    want, _ = oracle.divergence_gradient("symmetric_kl", a, b, scale / 4)
    assert_gradient(scaled, want, torch.float16)
    assert ((plain == 0) & (scaled != 0)).any()


def test_upstream_factor_multiplies_before_rounding(place):
    """A tiny fp16 gradient survives a large upstream factor: it is not rounded in between."""
    a, b = oracle.logit_pair(4, 9, 1e-2, dtype=torch.float16, device=place.device)
    a, scale = a * 1.001, 2.0**14
    x = a.clone().requires_grad_()
    (symmetric_kl(x, b, reduction="sum", backend=place.backend) * scale).backward()
    want, _ = oracle.divergence_gradient("symmetric_kl", a, b, scale)
    assert_gradient(x.grad, want, torch.float16)


@pytest.mark.parametrize("columns", [3, 64, 65, 1000])
def test_float64_is_served_by_the_reference(columns):
    a, b = (t.double() for t in oracle.logit_pair(3, columns, 1e-3))
    for name in DIVERGENCES:
        got = DIVERGENCES[name](a, b, reduction="none")
        assert got.dtype == torch.float64
        assert torch.equal(got, oracle.divergence(name, a, b))


def large_allocations(run, nbytes: int, device: str) -> int:
    """How many times ``run`` allocates ``nbytes`` or more, wherever in the call."""
    if device == "cuda":
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.memory._record_memory_history()
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: torch.cuda.memory._record_memory_history(enabled=None))
            run()
            trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        assert torch.cuda.memory_stats()["allocation.all.allocated"] >= before
        return sum(event["action"] == "alloc" and event["size"] >= nbytes for event in trace)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() >= nbytes for event in events)


@pytest.mark.parametrize("name", ["symmetric_kl", "kl"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 40), (8, 300)])
def test_nothing_of_the_size_of_the_logits_is_kept(kernel_place, rows, columns, name):
    a, b = (t.requires_grad_() for t in oracle.logit_pair(rows, columns, 0.3, device=kernel_place.device))
    a3, b3 = a.view(2, -1, columns), b.view(2, -1, columns)
    mask = torch.ones(2, rows // 2, dtype=torch.int64, device=kernel_place.device)
    mask[0, 0] = 0
    saved, size, losses = [], a.nelement() * a.element_size(), []

    def forward() -> None:
        losses.append(DIVERGENCES[name](a3, b3, mask=mask, backend=kernel_place.backend))

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward()
    own = [t for t in saved if t.untyped_storage().data_ptr() not in
           (a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr())]  # fmt: skip
    assert len(saved) > len(own)
    # five statistics, the loss and the weight of each row
    assert sum(t.nelement() for t in own) <= 8 * rows
    if kernel_place.interpreted:
        return  # the interpreter's own arrays are no tensors of the op
    assert large_allocations(lambda: torch.empty(size, dtype=torch.uint8, device=a.device), size, a.device.type) == 1
    assert large_allocations(forward, size, a.device.type) == 0
    gc.collect()
    assert large_allocations(lambda: torch.autograd.grad(losses.pop(), (a3, b3)), size, a.device.type) == 2
    one_side = DIVERGENCES[name](a3, b3.detach(), mask=mask, backend=kernel_place.backend)
    assert large_allocations(lambda: torch.autograd.grad(one_side, a3, retain_graph=True), size, a.device.type) == 1
    run = lambda: symmetric_kl_grad(a3, b3, mask=mask, divergence=name, backend=kernel_place.backend)  # noqa: E731
    assert large_allocations(run, size, a.device.type) == 1


@pytest.mark.parametrize("columns", [3, 70])
def test_second_derivative_raises_and_names_the_reference(kernel_place, columns):
    a, b = (t.requires_grad_() for t in oracle.logit_pair(3, columns, 0.3, device=kernel_place.device))
    (da,) = torch.autograd.grad(symmetric_kl(a, b, backend=kernel_place.backend), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives are not implemented .* backend='reference'"):
        da.sum().backward()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("perturbation", "temperature"), [(0.3, 1.0), (4.0, 2.0)])
def test_reference_derivatives_of_first_and_second_order(name, perturbation, temperature):
    a, b = (t.double().requires_grad_() for t in oracle.logit_pair(3, 4, perturbation, scale=1.0))
    mask = torch.tensor([1, 0, 1])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return DIVERGENCES[name](x, y, mask=mask, temperature=temperature, backend="reference")

    assert torch.autograd.gradcheck(loss, (a, b))
    assert torch.autograd.gradgradcheck(loss, (a, b))


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [3, 70, 3000])
def test_calls_are_bitwise_equal_on_any_number_of_threads_and_inputs_stay(compiled_place, columns):
    rows = 64 if compiled_place.backend == "reference" else 700
    a, b = oracle.logit_pair(rows, columns, 0.3, device=compiled_place.device)
    copies = a.clone(), b.clone()

    def run(number: int) -> list[Tensor]:
        x, y = a.requires_grad_(), b.requires_grad_()
        with threads(number):
            rows = symmetric_kl(x, y, reduction="none", backend=compiled_place.backend)
            gradients = torch.autograd.grad(rows, (x, y), torch.ones_like(rows))
            return [rows, *gradients, symmetric_kl_grad(x, y, backend=compiled_place.backend)[1]]

    first = run(1)
    for number in (1,) if compiled_place.backend == "reference" else (1, 2, 3):
        for one, other in zip(first, run(number), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


@settings(max_examples=15)
@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    columns=st.one_of(st.integers(1, 80), st.sampled_from((128, 200))),
    dtype=st.sampled_from(tuple(HALF_PLACE)),
    perturbation=st.sampled_from((1e-6, 1e-4, 1e-2, 1.0, 10.0)),
    scale=st.sampled_from((0.01, 3.0, 8.0)),
    raised=st.sampled_from((0.0, 24.0)),
    temperature=st.sampled_from((0.5, 1.0, 2.0)),  # others round the logits, see test_temperature
    transposed=st.booleans(),
    name=st.sampled_from(("symmetric_kl", "kl")),
    seed=st.integers(0, 1000),
)
def test_any_call(place, rows, columns, dtype, perturbation, scale, raised, temperature, transposed, name, seed):
    a, b = oracle.logit_pair(
        rows[0] * rows[1], columns, perturbation, scale=scale, raised=raised, dtype=dtype, device=place.device,
        seed=seed,
    )  # fmt: skip
    a, b = a.view(*rows, columns), b.view(*rows, columns)
    if transposed:
        a = a.transpose(0, 2).contiguous().transpose(0, 2)
    a, b = a.requires_grad_(), b.requires_grad_()
    got = DIVERGENCES[name](a, b, temperature=temperature, reduction="none", backend=place.backend)
    flat = a.reshape(-1, columns), b.reshape(-1, columns)
    want = oracle.divergence(name, *flat, temperature).view(rows)
    assert (got >= 0).all()
    error = (got.detach().cpu().double() - want).abs() - oracle.SMALLEST[torch.float32]
    assert (error <= value_bound(columns) * want).all()
    got.sum().backward()
    for side, gradient in zip((a, b), oracle.divergence_gradient(name, *flat, temperature=temperature), strict=True):
        assert_gradient(side.grad, gradient.view(a.shape), dtype)
