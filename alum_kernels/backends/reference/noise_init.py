"""Counter-based noise in plain PyTorch.

    words   = Philox4x32-10(key = (seed_lo, seed_hi), counter = (h // 4, s, sample_offset + b, stream))
    v       = (word >> 9) 2^-23 + 2^-24                     in (0, 1), exact in fp32
    uniform = std (2 v - 1)                                 on lane h % 4
    normal  = std sqrt(-2 ln v_0) (cos 2 pi v_1, sin 2 pi v_1)  on lanes (0, 1), and the same on (2, 3)

The noise of an element is a function of (seed, sample, position, feature) alone, so padding, shape buckets and
splitting a batch over ranks change nothing. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011. This file is the oracle of the native and Triton kernels of the same name.
"""

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words (held in int64) for every element of the broadcast counter."""
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    x0, x1, x2, x3 = counter
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, x0)
        high1, low1 = _multiply(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 that never overflows."""
    low = constant * (x & 0xFFFF)
    high = constant * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def words(shape: torch.Size, seed: Tensor, *, stream: int, sample_offset: int) -> Tensor:
    """(B, S, ceil(H / 4), 4) int64 words behind every element of a (B, S, H) tensor."""
    batch, length, hidden = shape
    device = seed.device
    group = torch.arange((hidden + 3) // 4, device=device)
    position = torch.arange(length, device=device)[:, None]
    sample = (torch.arange(batch, device=device) + sample_offset)[:, None, None] & WORD
    counter = torch.broadcast_tensors(group, position, sample, torch.full((), stream, device=device))
    return torch.stack(philox(seed.reshape(()), counter), dim=-1)


def unit_noise(
    shape: torch.Size, seed: Tensor, dtype: torch.dtype, *, distribution: str, stream: int, sample_offset: int
) -> Tensor:
    """(B, S, H) noise of unit scale in ``dtype``: standard normal, or uniform on (-1, 1)."""
    drawn = words(shape, seed, stream=stream, sample_offset=sample_offset)
    v = (drawn >> 9).to(dtype) * 2.0**-23 + 2.0**-24
    if distribution == "uniform":
        noise = 2 * v - 1
    else:
        radius = torch.sqrt(-2 * torch.log(v[..., 0::2]))
        turns = 4 * v[..., 1::2]
        quadrant = torch.round(turns)
        angle = (turns - quadrant) * (math.pi / 2)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        odd = quadrant % 2 == 1
        cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
        sign = torch.where(quadrant % 4 >= 2, -1.0, 1.0).to(dtype)
        noise = torch.stack((radius * cosine * sign, radius * sine * sign), dim=-1)
    return noise.flatten(2)[..., : shape[2]]


def initial_delta(
    shape: torch.Size,
    seed: Tensor,
    dtype: torch.dtype,
    *,
    std: Tensor | float,
    mask: Tensor | None,
    distribution: str,
    stream: int,
    sample_offset: int,
) -> Tensor:
    """delta_0 (B, S, H) in ``dtype``; ``std`` is a float or (B, S); masked positions are zero."""
    noise = unit_noise(shape, seed, dtype, distribution=distribution, stream=stream, sample_offset=sample_offset)
    delta = noise * (std.unsqueeze(-1).to(dtype) if isinstance(std, Tensor) else std)
    return delta if mask is None else torch.where(mask.unsqueeze(-1) != 0, delta, 0)


def noise_init(
    embeds: Tensor,
    seed: Tensor,
    *,
    std: Tensor | float,
    mask: Tensor | None,
    distribution: str,
    stream: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """(embeds + delta_0, delta_0): the sum is formed in the dtype of delta and rounded once."""
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    delta = initial_delta(
        embeds.shape,
        seed,
        dtype,
        std=std,
        mask=mask,
        distribution=distribution,
        stream=stream,
        sample_offset=sample_offset,
    )
    return (embeds.to(dtype) + delta).to(embeds.dtype), delta
