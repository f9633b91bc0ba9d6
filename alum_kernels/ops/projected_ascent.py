"""``projected_ascent``: one projected gradient step on the perturbation, and its sum with the embeddings.

What the op computes is stated in ``alum_kernels/backends/reference/projected_ascent.py``.
"""

from typing import Literal, Required, Unpack, overload

import torch
from torch import Tensor

from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference
from alum_kernels.ops import checks
from alum_kernels.ops.dispatch import LIBRARY, choose, implementation
from alum_kernels.ops.identity_gradient import IdentityGradient
from alum_kernels.ops.noise_init import NoiseOptions

NORMS = ("linf", "l2", "linf_rescale", "none")
NORMALIZE = ("none", "linf", "l2", "sign")
LEVELS = ("token", "sequence", "batch")
STATISTICS = ("delta_squared", "clipped", "unrepresentable", "non_finite")
"""Columns of the (B, S, 4) statistics."""

LIBRARY.define(
    "projected_ascent(Tensor embeds, Tensor grad, Tensor? delta, Tensor? seed, Tensor? std_per_token, float std,"
    " Tensor? step_per_token, float step_size, Tensor? epsilon_per_token, float epsilon, Tensor? mask,"
    " str distribution, int stream, SymInt sample_offset, str norm, str normalize, str level, bool return_delta,"
    " bool return_stats, str backend) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor | None,
    seed: Tensor | None,
    std_per_token: Tensor | None,
    std: float,
    step_per_token: Tensor | None,
    step_size: float,
    epsilon_per_token: Tensor | None,
    epsilon: float,
    mask: Tensor | None,
    distribution: str,
    stream: int,
    sample_offset: int,
    norm: str,
    normalize: str,
    level: str,
    return_delta: bool,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.dtype != embeds.dtype:
        grad = grad.to(torch.float32)
    embeds, grad = embeds.contiguous(), grad.contiguous()
    delta = None if delta is None else delta.contiguous()
    perturbed = torch.empty_like(embeds)
    new_delta = torch.empty(embeds.shape if return_delta else (0,), dtype=torch.float32, device=embeds.device)
    stats = torch.empty((*embeds.shape[:2], 4) if return_stats else (0,), dtype=torch.float32, device=embeds.device)
    if embeds.numel() == 0:
        return perturbed, new_delta, stats.zero_()
    implementation("projected_ascent", backend).projected_ascent(
        embeds,
        grad,
        delta,
        seed,
        std_per_token,
        std,
        step_per_token,
        step_size,
        epsilon_per_token,
        epsilon,
        mask,
        perturbed,
        new_delta,
        stats,
        distribution,
        stream,
        sample_offset,
        norm,
        normalize,
        level,
    )
    return perturbed, new_delta, stats


LIBRARY.impl("projected_ascent", _projected_ascent, "CompositeExplicitAutograd")


@torch.library.register_fake("alum_kernels::projected_ascent", lib=LIBRARY)
def _projected_ascent_fake(embeds, grad, *rest):
    return_delta, return_stats = rest[-3], rest[-2]
    return (
        embeds.new_empty(embeds.shape),
        embeds.new_empty(embeds.shape if return_delta else (0,), dtype=torch.float32),
        embeds.new_empty((*embeds.shape[:2], 4) if return_stats else (0,), dtype=torch.float32),
    )


def _check_group_radius(epsilon: Tensor | float, norm: str, level: str) -> None:
    """An l2 ball has one radius for the whole group."""
    dimensions = epsilon.dim() if isinstance(epsilon, Tensor) else 0
    largest = {"token": 2, "sequence": 1, "batch": 0}[level]
    if norm == "l2" and dimensions > largest:
        shape = {1: "() or (B,)", 0: "()"}[largest]
        raise ValueError(
            f"epsilon: norm='l2' at level={level!r} has one radius a {level}, so expected shape {shape}, "
            f"got {checks.shape_of(epsilon)}"
        )


class AscentOptions(NoiseOptions, total=False):
    """Options of :func:`projected_ascent`, for its overloads; what they mean, and their defaults, are said there."""

    step_size: Required[float | Tensor]
    epsilon: Required[float | Tensor]
    norm: str
    normalize: str
    level: str


@overload
def projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor | None = None,
    *,
    return_delta: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[AscentOptions],
) -> Tensor: ...


@overload
def projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor | None = None,
    *,
    return_delta: Literal[True],
    return_stats: bool = False,
    **options: Unpack[AscentOptions],
) -> tuple[Tensor, ...]: ...


@overload
def projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor | None = None,
    *,
    return_delta: bool = False,
    return_stats: Literal[True],
    **options: Unpack[AscentOptions],
) -> tuple[Tensor, ...]: ...


def projected_ascent(
    embeds: Tensor,
    grad: Tensor,
    delta: Tensor | None = None,
    *,
    seed: Tensor | int | None = None,
    std: float | Tensor = 1e-5,
    distribution: str = "normal",
    stream: int = 0,
    sample_offset: int = 0,
    step_size: float | Tensor,
    epsilon: float | Tensor,
    norm: str = "linf",
    normalize: str = "none",
    level: str = "token",
    mask: Tensor | None = None,
    return_delta: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Embeddings plus the climbed perturbation, ``embeds + Pi(delta + step_size * normalise(grad))``.

    A *group* is a token, a sequence or the batch, by ``level``; norms are taken per group, over unmasked elements. A
    group whose gradient is zero (below 2^-126) or holds a non-finite element takes no step but is projected. The
    gradient to ``embeds`` is the identity; ``grad`` and ``delta`` receive none.

    Args:
        embeds: (B, S, H) fp32, bf16, fp16 or fp64 (fp64 on the reference backend).
        grad: (B, S, H), gradient of the inner objective with respect to the perturbed embeddings, any of these dtypes.
        delta: (B, S, H) fp32 (fp64 for fp64 embeddings), the perturbation so far. Exactly one of ``delta`` and
            ``seed`` is given: with ``seed``, delta_0 is drawn again inside the kernel and never stored.
        seed, std, distribution, stream, sample_offset: as given to :func:`noise_init`.
        step_size: length of the step, a float or an fp32 device tensor of shape (), (B,) or (B, S).
        epsilon: radius of the ball, likewise; not used by ``norm="linf_rescale"`` and ``"none"``. With ``norm="l2"``
            it has one value a group.
        norm: projection: ``"linf"`` clips each element to epsilon, ``"l2"`` scales a group into the ball,
            ``"linf_rescale"`` divides by max|delta| + 1e-6 as MT-DNN does, ``"none"`` projects nothing.
        normalize: ``"none"``, ``"linf"`` (g / max|g|), ``"l2"`` (g / ||g||) or ``"sign"``.
        level: ``"token"``, ``"sequence"`` or ``"batch"`` (this device's part of it).
        mask: (B, S) bool or integers 0 and 1; where it is 0 the perturbation is zero and counts in no norm.
        return_delta: also return the new perturbation.
        return_stats: also return statistics, columns as in ``STATISTICS``.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest that can serve.

    Returns:
        (B, S, H) in the dtype of ``embeds``; then, as asked for, the perturbation (B, S, H) fp32 (fp64 for fp64) and
        statistics (B, S, 4) fp32: ||delta||^2, elements that the projection changed, elements whose perturbation the
        dtype of ``embeds`` cannot represent, non-finite elements of ``grad``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        BackendUnavailableError: ``backend`` cannot serve the call.

    Sources: lines 5 to 7 of Algorithm 1 of Liu et al., arXiv:2004.08994 (raw gradient, clip); Algorithm 1 of Jiang et
    al., arXiv:1911.03437 (infinity norm per sequence); equation 3 of Zhu et al., arXiv:1909.11764 (l2).

    Example:
        >>> import torch
        >>> from alum_kernels import projected_ascent
        >>> embeds, grad = torch.zeros(1, 2, 3), torch.tensor([[[1., -2., 0.], [0., 0., 0.]]])
        >>> projected_ascent(embeds, grad, torch.zeros(1, 2, 3), step_size=1.0, epsilon=0.75, normalize="linf")
        tensor([[[ 0.5000, -0.7500,  0.0000],
                 [ 0.0000,  0.0000,  0.0000]]])
    """
    checks.check_floating("embeds", embeds)
    checks.check_rank("embeds", embeds, 3, "(B, S, H)")
    checks.check_floating("grad", grad)
    checks.check_like("grad", grad, "embeds", embeds, dtype=False)
    checks.check_choice("norm", norm, NORMS)
    checks.check_choice("normalize", normalize, NORMALIZE)
    checks.check_choice("level", level, LEVELS)
    checks.check_noise(distribution, stream, sample_offset)
    checks.check_mask(mask, embeds.shape[:2], embeds.device)
    if (delta is None) == (seed is None):
        given = "neither" if delta is None else "both"
        raise ValueError(f"delta, seed: expected exactly one of them, got {given}")
    if delta is not None:
        checks.check_floating("delta", delta)
        checks.check_like("delta", delta, "embeds", embeds, dtype=False)
        expected = torch.promote_types(embeds.dtype, torch.float32)
        if delta.dtype != expected:
            raise TypeError(f"delta: expected {expected} for {embeds.dtype} embeddings, got {delta.dtype}")
    _check_group_radius(epsilon, norm, level)
    std_per_token, std_value = checks.per_token("std", std, embeds)
    step_per_token, step_value = checks.per_token("step_size", step_size, embeds)
    epsilon_per_token, epsilon_value = checks.per_token("epsilon", epsilon, embeds)
    seed = None if seed is None else checks.as_seed(seed, embeds.device)
    chosen = choose("projected_ascent", backend, embeds)
    if chosen == "reference":
        results = reference.projected_ascent(
            embeds.detach(),
            grad.detach(),
            reference_noise.initial_delta(
                embeds.shape,
                seed,
                torch.promote_types(embeds.dtype, torch.float32),
                std=std_value if std_per_token is None else std_per_token,
                mask=mask,
                distribution=distribution,
                stream=stream,
                sample_offset=sample_offset,
            )
            if delta is None
            else delta.detach(),
            step_size=step_value if step_per_token is None else step_per_token,
            epsilon=epsilon_value if epsilon_per_token is None else epsilon_per_token,
            norm=norm,
            normalize=normalize,
            level=level,
            mask=mask,
        )
    else:
        results = torch.ops.alum_kernels.projected_ascent(
            embeds.detach(),
            grad.detach(),
            None if delta is None else delta.detach(),
            seed,
            std_per_token,
            std_value,
            step_per_token,
            step_value,
            epsilon_per_token,
            epsilon_value,
            mask,
            distribution,
            stream,
            sample_offset,
            norm,
            normalize,
            level,
            return_delta,
            return_stats,
            chosen,
        )
    perturbed = IdentityGradient.apply(embeds, results[0])
    wanted = (True, return_delta, return_stats)
    returned = tuple(r for r, want in zip((perturbed, *results[1:]), wanted, strict=True) if want)
    return returned[0] if len(returned) == 1 else returned
