"""Ops under ``torch.compile``, and ``opcheck`` of everything that is registered."""

import oracle
import pytest
import torch
from torch import Tensor

from alum_kernels import (
    js,
    kl,
    noise_init,
    projected_ascent,
    squared_error,
    squared_hellinger,
    symmetric_kl,
    symmetric_kl_grad,
)

OPS = torch.ops.alum_kernels


def logits(place, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    b = 3 * torch.randn(shape, generator=generator)
    return (b + 0.1 * torch.randn(shape, generator=generator)).to(place.device), b.to(place.device)


def embeddings(place, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator).to(place.device) for _ in range(3))


def raw_calls(place) -> dict[str, list[tuple]]:
    """Arguments of each raw op: optional ones absent and present, layouts and dtypes that public functions pass on."""
    a, b = logits(place, 2, 3, 5)
    wide_a, wide_b = logits(place, 1, 4, 70)
    shifted = (wide_a[:, 1:], wide_b[:, :-1])
    rows = torch.rand(2, 3, device=place.device)
    embeds, grad, delta = embeddings(place, 2, 3, 6)
    seed = torch.tensor([3], device=place.device)
    token = torch.rand(2, 3, device=place.device)
    sample = torch.rand(2, device=place.device).unsqueeze(1).expand(2, 3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=place.device)
    statistics = OPS.symmetric_kl_loss(a, b, None, "symmetric_kl", 1.0, place.backend)[1]
    backend = place.backend
    return {
        "noise_init": [
            (embeds, seed, None, 0.1, None, "normal", 0, 0, False, backend),
            (embeds.bfloat16(), seed, sample, 0.0, mask, "uniform", 1, 7, True, backend),
            (embeds.transpose(0, 1), seed, None, 0.1, mask.t(), "normal", 0, 2**33, True, backend),
        ],
        "projected_ascent": [
            (embeds, grad, delta, None, None, 0.0, None, 0.1, None, 0.2, None, "normal", 0, 0, "linf", "none", "token",
             False, False, backend),
            (embeds.half(), grad, None, seed, token, 0.0, sample, 0.0, token, 0.0, mask, "uniform", 2, 5, "l2", "l2",
             "token", True, True, backend),
            (embeds.transpose(0, 2).contiguous().transpose(0, 2), grad, delta, None, None, 0.0, None, 0.1, None, 0.2,
             mask, "normal", 0, 0, "linf_rescale", "sign", "sequence", True, True, backend),
        ],
        "symmetric_kl_loss": [
            (a, b, None, "symmetric_kl", 1.0, backend),
            (*shifted, rows[:1, :3], "kl", 0.5, backend),
            (a.bfloat16().transpose(0, 1), b.bfloat16().transpose(0, 1), None, "symmetric_kl", 1.0, backend),
        ],
        "symmetric_kl_gradient": [
            (a, b, statistics, rows, "symmetric_kl", "full", 1.0, True, True, backend),
            (a, b, statistics, rows[:1, :1].expand(2, 3), "kl", "detach_targets", 2.0, True, False, backend),
            (a, b, statistics, rows, "symmetric_kl", "full", 1.0, False, True, backend),
        ],
        "symmetric_kl_loss_and_gradient": [
            (a, b, None, "symmetric_kl", "full", 1.0, 1.0, True, backend),
            (*shifted, rows[:1, :3], "kl", "detach_clean", 0.5, 4.0, False, backend),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("op", ["noise_init", "projected_ascent", "symmetric_kl_loss", "symmetric_kl_gradient",
                                "symmetric_kl_loss_and_gradient"])  # fmt: skip
def test_opcheck(kernel_place, op):
    """Schema, fake tensors and tracing agree with what the op does; it writes into no argument."""
    for arguments in raw_calls(kernel_place)[op]:
        torch.library.opcheck(
            getattr(OPS, op).default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def adversarial_step(place, embeds: Tensor, weight: Tensor, grad: Tensor, mask: Tensor, seed: Tensor, std: Tensor):
    """Noise, a stand-in for a model, the divergence, the ascent, divergences again: all public ops in one graph."""
    backend = place.backend
    clean = embeds @ weight
    noisy = noise_init(embeds, std=std, seed=seed, mask=mask, backend=backend)
    start = symmetric_kl(noisy @ weight, clean, mask=mask, gradient="full", backend=backend)
    perturbed, stats = projected_ascent(
        embeds, grad, seed=seed, std=std, step_size=std * 3, epsilon=std * 2, normalize="linf", level="sequence",
        mask=mask, return_stats=True, backend=backend,
    )  # fmt: skip
    adversarial = perturbed @ weight
    divergence = kl(adversarial, clean, mask=mask, reduction="sum", gradient="detach_targets", backend=backend)
    value, gradient = symmetric_kl_grad(adversarial, clean, mask=mask, backend=backend)
    regression = squared_error(adversarial, clean, mask=mask, gradient="detach_clean")
    return start + divergence + regression, value, gradient, stats


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_step_equals_eager(kernel_place, compiler):
    """One graph without a break, forward and backward, whatever the batch: shapes are not compiled in."""
    place = kernel_place
    if compiler == "inductor" and place.interpreted:
        pytest.skip("inductor has no part in how an interpreted kernel runs: aot_eager covers the graph")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda *tensors: adversarial_step(place, *tensors), fullgraph=True, dynamic=True, backend=compiler
    )
    for batch, length in ((2, 3), (3, 2)):
        embeds, grad, _ = embeddings(place, batch, length, 6)
        weight = embeddings(place, 1, 6, 70)[0][0].clone()
        mask = (torch.arange(batch * length, device=place.device).view(batch, length) % 3 != 1).long()
        seed = torch.tensor([batch], device=place.device)
        std = torch.tensor(0.01 * batch, device=place.device)
        results = []
        for step in (lambda *tensors: adversarial_step(place, *tensors), compiled):
            inputs = [embeds.clone().requires_grad_(), weight.clone().requires_grad_()]
            loss, *rest = step(*inputs, grad, mask, seed, std)
            results.append([loss.detach(), *rest, *torch.autograd.grad(loss, inputs)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=2e-5, atol=2e-6 * float(eager.abs().max()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("function", "gradient", "reduction"),
    [
        (symmetric_kl, "full", "none"),
        (symmetric_kl, "detach_targets", "mean"),
        (symmetric_kl, "detach_clean", "sum"),
        (kl, "full", "batchmean"),
        (js, "full", "mean"),
        (squared_hellinger, "full", "mean"),
    ],
)
def test_compiled_reference_equals_eager(function, gradient, reduction):
    a, b = (t.view(2, 3, 7) for t in oracle.logit_pair(6, 7, 0.1))

    def run(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y, gradient=gradient, reduction=reduction, temperature=2.0, backend="reference")

    torch._dynamo.reset()
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        rows = call(x, y)
        results.append((rows, *torch.autograd.grad(rows.sum(), (x, y), allow_unused=True)))
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()


def test_magnitudes_as_tensors_do_not_recompile(kernel_place):
    """A schedule of step sizes and radii, as the training wrapper passes them, runs on one graph."""
    torch._dynamo.reset()
    embeds, grad, delta = embeddings(kernel_place, 2, 2, 4)

    def run(step_size: Tensor, epsilon: Tensor) -> Tensor:
        return projected_ascent(embeds, grad, delta, step_size=step_size, epsilon=epsilon, backend=kernel_place.backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for value in (0.1, 0.2, 0.3):
        sizes = torch.tensor(value, device=kernel_place.device), torch.tensor(2 * value, device=kernel_place.device)
        assert torch.equal(compiled(*sizes), run(*sizes))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_fakes_have_the_shapes_of_the_real_thing(kernel_place):
    """On meta tensors, where nothing can be computed, shapes and dtypes are still those of a real call."""
    for op, calls in raw_calls(kernel_place).items():
        for arguments in calls:
            real = getattr(OPS, op)(*arguments)
            meta = getattr(OPS, op)(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
            for one, other in zip(real, meta, strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
                assert other.device.type == "meta"
