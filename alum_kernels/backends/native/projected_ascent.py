"""The native kernel of ``projected_ascent``: ``csrc/cpu/projected_ascent.h`` and ``csrc/cuda/projected_ascent.cu``."""

import torch
from torch import Tensor

from alum_kernels.backends.native import require

require()

# In the order of the enums in csrc/core/arguments.h.
NORMS = {"linf": 0, "l2": 1, "linf_rescale": 2, "none": 3}
NORMALIZE = {"none": 0, "linf": 1, "l2": 2, "sign": 3}
LEVELS = {"token": 0, "sequence": 1, "batch": 2}


def projected_ascent(
    embeds: Tensor,  # (B, S, H) contiguous
    grad: Tensor,  # (B, S, H) contiguous, fp32 or as embeds
    delta: Tensor | None,  # (B, S, H) fp32 contiguous
    seed: Tensor | None,  # (1,) int64
    std_per_token: Tensor | None,  # (B, S) fp32
    std: float,
    step_per_token: Tensor | None,  # (B, S) fp32
    step_size: float,
    epsilon_per_token: Tensor | None,  # (B, S) fp32
    epsilon: float,
    mask: Tensor | None,  # (B, S)
    perturbed: Tensor,  # (B, S, H), written
    new_delta: Tensor,  # (B, S, H) fp32 or empty, written
    stats: Tensor,  # (B, S, 4) fp32 or empty, written
    distribution: str,
    stream: int,
    sample_offset: int,
    norm: str,
    normalize: str,
    level: str,
) -> None:
    torch.ops.alum_kernels_native.projected_ascent(
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
        distribution == "normal",
        stream,
        sample_offset,
        NORMS[norm],
        NORMALIZE[normalize],
        LEVELS[level],
    )
