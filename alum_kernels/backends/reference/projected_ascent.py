"""The projected ascent step in plain PyTorch.

    n       = normalise(g)        per group, see below
    delta'  = delta + step n      groups with a zero or non-finite gradient take no step ...
    delta'' = Pi(delta')          ... but every group is projected; masked positions are zero
    out     = embeds + delta''    formed in fp32 (float64 for float64 embeddings), rounded once

A group is a token, a sequence or the batch. ``normalise`` is g, g / max|g|, sign(g) or g / ||g||, the last taken on
g / max|g| so that no square under- or overflows. ``Pi`` is one of

    none           delta'
    linf           min(max(delta', -epsilon), epsilon), per element
    l2             delta' min(1, epsilon / ||delta'||), per group
    linf_rescale   delta' / (max|delta'| + 1e-6), per group (what MT-DNN computes)
"""

import torch
from torch import Tensor

SMALLEST_NORMAL = 2.0**-126
RESCALE_FLOOR = 1e-6

_GROUP_DIMS = {"token": (2,), "sequence": (1, 2), "batch": (0, 1, 2)}


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max|x| over a group, zero for an empty one (amax has no identity)."""
    if x.numel() == 0:
        return x.new_zeros([1 if d in dims else n for d, n in enumerate(x.shape)])
    return x.abs().amax(dims, keepdim=True)


def _euclidean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """||x|| over a group without under- or overflow: max|x| times the norm of x / max|x|."""
    scale = _largest(x, dims)
    safe = torch.where(scale > 0, scale, 1)
    return scale * torch.sqrt(((x / safe) ** 2).sum(dims, keepdim=True))


def _normalise(grad: Tensor, largest: Tensor, normalize: str, dims: tuple[int, ...]) -> Tensor:
    if normalize == "none":
        return grad
    if normalize == "sign":
        return torch.sign(grad)
    scaled = grad / largest
    return scaled if normalize == "linf" else scaled / torch.sqrt((scaled**2).sum(dims, keepdim=True))


def projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor,
    *,
    step_size: Tensor | float,
    epsilon: Tensor | float,
    norm: str,
    normalize: str,
    level: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(embeds + delta'', delta'', stats).

    ``step_size`` and ``epsilon`` are floats or (B, S). ``stats`` is (B, S, 4) fp32: ||delta''||^2, elements that the
    projection changed, elements whose perturbation the embedding dtype lost, non-finite gradient elements.
    """
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    dims = _GROUP_DIMS[level]
    valid = torch.ones_like(embeds[..., :1], dtype=torch.bool) if mask is None else (mask != 0).unsqueeze(-1)
    step = step_size.unsqueeze(-1).to(dtype) if isinstance(step_size, Tensor) else step_size
    radius = epsilon.unsqueeze(-1).to(dtype) if isinstance(epsilon, Tensor) else epsilon

    grad = torch.where(valid, grad.to(dtype), 0)
    delta = torch.where(valid, delta.to(dtype), 0)
    finite = torch.isfinite(grad)
    largest = _largest(torch.where(finite, grad, 0), dims)
    climbs = finite.all(dims[0], keepdim=True)
    for dim in dims[1:]:
        climbs = climbs.all(dim, keepdim=True)
    climbs = climbs & (largest >= SMALLEST_NORMAL)
    direction = _normalise(torch.where(climbs, grad, 1), torch.where(climbs, largest, 1), normalize, dims)
    moved = delta + torch.where(climbs & valid, step * direction, 0)

    if norm == "linf":
        projected = torch.clamp(moved, -radius, radius)
    elif norm == "l2":
        length = _euclidean(moved, dims)
        outside = (length > radius) | (radius != radius)  # a radius that is NaN gives NaN, as clamp does
        projected = torch.where(outside, moved * (radius / torch.where(outside, length, 1)), moved)
    elif norm == "linf_rescale":
        projected = moved / (_largest(moved, dims) + RESCALE_FLOOR)
    else:
        projected = moved
    perturbed = (embeds.to(dtype) + projected).to(embeds.dtype)
    stats = torch.stack(
        (
            (projected**2).sum(-1),
            (projected != moved).sum(-1),
            ((perturbed == embeds) & (projected != 0)).sum(-1),
            (~finite).sum(-1),
        ),
        dim=-1,
    )
    return perturbed, projected, stats.to(torch.float32)
