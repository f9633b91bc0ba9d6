"""A config, and what is looked at, in the tests of local linearity."""

import pytest
import torch
from tiny_models import Gradients
from torch import Tensor

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.perturbation import Perturbation

NEAR = AdversarialConfig.llr(std=0.05, step_size=0.05, epsilon=0.1, units="absolute")


def watched_deltas(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The perturbation of every final pass: the last of each step, in order."""
    seen: list[Tensor] = []
    original = Perturbation.perturb

    def perturb(self: Perturbation, index: int, output: Tensor, **options: bool) -> Tensor:
        perturbed = original(self, index, output, **options)
        seen.append((perturbed - output).detach())
        return perturbed

    monkeypatch.setattr(Perturbation, "perturb", perturb)
    return seen


def compare(ours: Gradients, expected: Gradients, *, rtol: float = 1e-8, atol: float = 1e-12) -> None:
    assert expected.flat().abs().sum() > 0
    for name, grad in expected.values.items():
        other = ours.values[name]
        if grad is None or other is None:
            assert not any(g is not None and g.any() for g in (grad, other)), name
            continue
        torch.testing.assert_close(other, grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
