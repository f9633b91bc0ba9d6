"""``noise_init``: add seeded noise to embeddings, in one launch.

What the op computes is stated in ``alum_kernels/backends/reference/noise_init.py``.
"""

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from alum_kernels.backends.reference import noise_init as reference
from alum_kernels.ops import checks
from alum_kernels.ops.dispatch import LIBRARY, choose, implementation
from alum_kernels.ops.identity_gradient import IdentityGradient

LIBRARY.define(
    "noise_init(Tensor embeds, Tensor seed, Tensor? std_per_token, float std, Tensor? mask, str distribution,"
    " int stream, SymInt sample_offset, bool return_delta, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _noise_init(
    embeds: Tensor,
    seed: Tensor,
    std_per_token: Tensor | None,
    std: float,
    mask: Tensor | None,
    distribution: str,
    stream: int,
    sample_offset: int,
    return_delta: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    embeds = embeds.contiguous()
    perturbed = torch.empty_like(embeds)
    delta = torch.empty(embeds.shape if return_delta else (0,), dtype=torch.float32, device=embeds.device)
    implementation("noise_init", backend).noise_init(
        embeds, seed, std_per_token, std, mask, perturbed, delta, distribution, stream, sample_offset
    )
    return perturbed, delta


LIBRARY.impl("noise_init", _noise_init, "CompositeExplicitAutograd")


@torch.library.register_fake("alum_kernels::noise_init", lib=LIBRARY)
def _noise_init_fake(
    embeds, seed, std_per_token, std, mask, distribution, stream, sample_offset, return_delta, backend
):
    shape = embeds.shape if return_delta else (0,)
    return embeds.new_empty(embeds.shape), embeds.new_empty(shape, dtype=torch.float32)


class NoiseOptions(TypedDict, total=False):
    """Options of :func:`noise_init`, for its overloads; what they mean, and their defaults, are said there."""

    std: float | Tensor
    distribution: str
    mask: Tensor | None
    seed: Tensor | int | None
    stream: int
    sample_offset: int
    backend: str | None


@overload
def noise_init(
    embeds: Tensor,
    *,
    return_delta: Literal[False] = False,
    **options: Unpack[NoiseOptions],
) -> Tensor: ...


@overload
def noise_init(
    embeds: Tensor,
    *,
    return_delta: Literal[True],
    **options: Unpack[NoiseOptions],
) -> tuple[Tensor, Tensor]: ...


def noise_init(
    embeds: Tensor,
    *,
    std: float | Tensor = 1e-5,
    distribution: str = "normal",
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    stream: int = 0,
    sample_offset: int = 0,
    return_delta: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Embeddings plus the first perturbation, ``embeds + delta_0``.

    The noise is a pure function of (seed, sample, position, feature): padding a batch, or splitting it over ranks with
    each rank's own ``sample_offset``, changes nothing. The gradient to ``embeds`` is the identity.

    Args:
        embeds: (B, S, H) fp32, bf16, fp16 or fp64 (fp64 on the reference backend).
        std: standard deviation of normal noise, half-width of uniform noise, in units of ``embeds``. A float, or an
            fp32 device tensor of shape (), (B,) or (B, S): a float recompiles per value under ``torch.compile`` and is
            frozen in a captured CUDA graph.
        distribution: ``"normal"`` or ``"uniform"`` (on the open interval (-std, std)).
        mask: (B, S) bool or integers 0 and 1; where it is 0 no noise is added.
        seed: one-element int64 tensor on the device of ``embeds``; an int is copied there (and is frozen in a captured
            graph); None draws one from the device's default generator.
        stream: index of the perturbed module, so that two modules draw different noise from one seed.
        sample_offset: place of this batch's first sample in the global batch.
        return_delta: also return delta_0.
        backend: ``"reference"``, ``"native"`` or ``"triton"``; None picks the fastest that can serve.

    Returns:
        (B, S, H) in the dtype of ``embeds``; with ``return_delta`` also delta_0, (B, S, H) fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        BackendUnavailableError: ``backend`` cannot serve the call.

    Source: the random start of Algorithm 1 of Liu et al., "Adversarial Training for Large Neural Language Models",
    arXiv:2004.08994.

    Example:
        >>> import torch
        >>> from alum_kernels import noise_init
        >>> embeds = torch.zeros(2, 5, 8)
        >>> perturbed, delta = noise_init(embeds, std=1e-2, seed=7, return_delta=True)
        >>> torch.equal(perturbed, delta), torch.equal(perturbed, noise_init(embeds, std=1e-2, seed=7))
        (True, True)
    """
    checks.check_floating("embeds", embeds)
    checks.check_rank("embeds", embeds, 3, "(B, S, H)")
    checks.check_noise(distribution, stream, sample_offset)
    checks.check_mask(mask, embeds.shape[:2], embeds.device)
    std_per_token, std_value = checks.per_token("std", std, embeds)
    seed = checks.as_seed(seed, embeds.device)
    chosen = choose("noise_init", backend, embeds)
    if chosen == "reference":
        perturbed, delta = reference.noise_init(
            embeds.detach(),
            seed,
            std=std_value if std_per_token is None else std_per_token,
            mask=mask,
            distribution=distribution,
            stream=stream,
            sample_offset=sample_offset,
        )
    else:
        perturbed, delta = torch.ops.alum_kernels.noise_init(
            embeds.detach(),
            seed,
            std_per_token,
            std_value,
            mask,
            distribution,
            stream,
            sample_offset,
            return_delta,
            chosen,
        )
    perturbed = IdentityGradient.apply(embeds, perturbed)
    return (perturbed, delta) if return_delta else perturbed
