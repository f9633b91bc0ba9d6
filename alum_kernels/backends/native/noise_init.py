"""The native kernel of ``noise_init``: ``csrc/cpu/noise_init.h`` and ``csrc/cuda/noise_init.cu``."""

import torch
from torch import Tensor

from alum_kernels.backends.native import require

require()


def noise_init(
    embeds: Tensor,  # (B, S, H) contiguous
    seed: Tensor,  # (1,) int64
    std_per_token: Tensor | None,  # (B, S) fp32
    std: float,
    mask: Tensor | None,  # (B, S)
    perturbed: Tensor,  # (B, S, H), written
    delta: Tensor,  # (B, S, H) fp32 or empty, written
    distribution: str,
    stream: int,
    sample_offset: int,
) -> None:
    torch.ops.alum_kernels_native.noise_init(
        embeds, seed, std_per_token, std, mask, perturbed, delta, distribution == "normal", stream, sample_offset
    )
