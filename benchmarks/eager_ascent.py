"""The baseline: noise and projected ascent in plain PyTorch, as people write them.

Noise comes from ``torch.randn_like`` or ``uniform_`` (PyTorch's generator, sequential on a CPU). The ascent reads a
stored delta; it counts nothing, guards against zero gradients by a small constant in the denominator and against
non-finite ones not at all.
"""

from typing import Any

import torch
from torch import Tensor

DIMENSIONS = {"token": (-1,), "sequence": (-2, -1), "batch": (-3, -2, -1)}
FLOOR = 1e-12


def eager_noise_init(embeds: Tensor, std: float, distribution: str) -> Tensor:
    if distribution == "normal":
        return embeds + std * torch.randn_like(embeds)
    return embeds + torch.empty_like(embeds).uniform_(-std, std)


def _normalised(grad: Tensor, normalize: str, dims: tuple[int, ...]) -> Tensor:
    if normalize == "sign":
        return grad.sign()
    if normalize == "linf":
        return grad / (grad.abs().amax(dims, keepdim=True) + FLOOR)
    if normalize == "l2":
        return grad / (torch.linalg.vector_norm(grad, dim=dims, keepdim=True) + FLOOR)
    return grad


def _projected(delta: Tensor, norm: str, epsilon: float, dims: tuple[int, ...]) -> Tensor:
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    if norm == "l2":
        length = torch.linalg.vector_norm(delta, dim=dims, keepdim=True)
        return delta * (epsilon / (length + FLOOR)).clamp(max=1.0)
    if norm == "linf_rescale":
        return delta / (delta.abs().amax(dims, keepdim=True) + 1e-6)
    return delta


def eager_projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor,
    *,
    step_size: float,
    epsilon: float,
    norm: str,
    normalize: str,
    level: str,
) -> Tensor:
    """The sum embeds + Pi(delta + step_size * normalise(grad)), (B, S, H)."""
    dims = DIMENSIONS[level]
    return embeds + _projected(delta + step_size * _normalised(grad, normalize, dims), norm, epsilon, dims)


def eager_noise_and_ascent(embeds: Tensor, grad: Tensor, std: float, **ascent: Any) -> tuple[Tensor, Tensor]:
    """Both perturbed embeddings of a step with K = 1: with delta_0, and after the ascent from it."""
    delta = std * torch.randn_like(embeds)
    return embeds + delta, eager_projected_ascent(embeds, grad, delta, **ascent)
