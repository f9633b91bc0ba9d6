"""Operands of linear divergences, what the functions make of them, and how far apart two results are."""

import torch
from torch import Tensor

from alum_kernels import linear_kl, linear_symmetric_kl
from alum_kernels.backends.linear_chunks import LinearDivergence, LinearOptions, LinearResult, Wanted
from alum_kernels.ops.dispatch import implementation

FUNCTIONS = {"symmetric_kl": linear_symmetric_kl, "kl": linear_kl}
NAMES = ("adv_hidden", "hidden", "weight", "bias")


def operands(
    rows: int = 7,
    size: int = 12,
    columns: int = 70,
    perturbation: float = 0.1,
    *,
    spread: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Hidden states that differ by ``perturbation`` standard deviations, and a head."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator)
    made = {
        "adv_hidden": hidden + perturbation * torch.randn(rows, size, generator=generator),
        "hidden": hidden,
        "weight": spread * torch.randn(columns, size, generator=generator),
        "bias": torch.randn(columns, generator=generator),
    }
    return {name: tensor.to(device, dtype) for name, tensor in made.items()}


def value_and_gradients(given: dict[str, Tensor], divergence: str, *, upstream: float = 1.0, **options):
    """The loss, and the gradient of ``upstream`` times its sum to each operand (zero where it receives none)."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    loss = FUNCTIONS[divergence](*leaves.values(), **options)
    (loss.sum() * upstream).backward()
    return loss.detach(), {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}


def in_float64(given: dict[str, Tensor], divergence: str, **options):
    return value_and_gradients(
        {name: tensor.cpu().double() for name, tensor in given.items()}, divergence, backend="reference", **options
    )


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error; the absolute one where nothing, or only the oracle's own rounding, is expected."""
    expected = expected.double()
    found = found.cpu().double()
    size = expected.norm().item()
    return (found - expected).norm().item() / (size if size > 1e-13 else 1.0)


def assert_close(found, expected, *, value: float = 2e-6, gradient: float = 5e-6) -> None:
    assert error(found[0], expected[0]) <= value
    for name in NAMES:
        if name in expected[1]:
            assert error(found[1][name], expected[1][name]) <= gradient, name


def under_plan(given: dict[str, Tensor], plan: str, backend: str) -> LinearResult:
    """Losses and gradients of the sum before they are rounded, under a plan of the products."""
    kernel, options = implementation("linear_symmetric_kl", backend), LinearOptions("symmetric_kl", "full")
    return LinearDivergence(kernel, *given.values(), None, None, options, Wanted(True, True, True, True), plan).run()
