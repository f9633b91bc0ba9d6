"""The float64 oracle, and how an error against it is measured.

Divergences: the float64 reference, itself held against 50 digits in ``test_symmetric_kl_accuracy.py``. Noise and the
ascent: written again here, in NumPy and from the definitions, so that the reference is under test as well.
"""

import numpy as np
import torch
from torch import Tensor

from alum_kernels.backends.reference import symmetric_kl as reference


def logit_pair(
    rows: int,
    columns: int,
    perturbation: float,
    *,
    scale: float = 3.0,
    raised: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Adversarial and clean logits (rows, columns): b = scale randn, one class raised, a = b + perturbation randn."""
    generator = torch.Generator().manual_seed(seed)
    b = scale * torch.randn(rows, columns, generator=generator)
    b[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] += raised
    a = b + perturbation * torch.randn(rows, columns, generator=generator)
    return a.to(device, dtype), b.to(device, dtype)


def divergence(name: str, a: Tensor, b: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,) float64 divergence of each row of (N, V) logits as they are, rounding included."""
    rows, _ = reference.loss(
        a.detach().cpu().double(), b.detach().cpu().double(), None, divergence=name, inv_temperature=1 / temperature
    )
    return rows


def divergence_gradient(
    name: str, a: Tensor, b: Tensor, upstream: Tensor | float = 1.0, gradient: str = "full", temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """(N, V) float64 gradients of each row's divergence, times ``upstream`` (N,)."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    upstream = torch.as_tensor(upstream, dtype=torch.float64).cpu().expand(a.shape[0])
    return reference.gradient(a, b, upstream, divergence=name, gradient=gradient, inv_temperature=1 / temperature)


SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
"""Smallest subnormal of each dtype: what a result of that dtype cannot resolve is not an error."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest relative error over the rows whose divergence is not zero, beyond the smallest subnormal of ``got``."""
    floor = SMALLEST.get(got.dtype, 0.0)
    got, want = got.detach().cpu().double(), want.double()
    counted = want != 0
    assert counted.any(), "the rows under test must differ"
    return float((((got - want).abs() - floor).clamp(min=0) / want.abs())[counted].max())


def gradient_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative L2 error over the whole and as the median row, of what exceeds the smallest subnormal of ``got``."""
    floor = SMALLEST.get(got.dtype, 0.0)
    got, want = got.detach().cpu().double(), want.double()
    error = ((got - want).abs() - floor).clamp(min=0).norm(dim=-1)
    size = want.norm(dim=-1)
    counted = size > 0
    assert counted.any(), "some row must have a gradient"
    return float(error.norm() / size.norm()), float((error[counted] / size[counted]).median())


_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = np.uint64(0xFFFFFFFF)


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 words (..., 4) of counters (..., 4), both uint64 below 2^32; the seed's halves are the key."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    x = counter.astype(np.uint64)
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * x[..., 0], _MULTIPLIERS[1] * x[..., 2]
        x = np.stack(
            (
                (product1 >> np.uint64(32)) ^ x[..., 1] ^ np.uint64(key[0]),
                product1 & _WORD,
                (product0 >> np.uint64(32)) ^ x[..., 3] ^ np.uint64(key[1]),
                product0 & _WORD,
            ),
            axis=-1,
        )
        key = [(part + weyl) & 0xFFFFFFFF for part, weyl in zip(key, _WEYL, strict=True)]
    return x


def unit_noise(
    shape: tuple[int, int, int], seed: int, distribution: str = "normal", stream: int = 0, sample_offset: int = 0
) -> Tensor:
    """(B, S, H) float64 noise of unit scale by the definition, cosines and sines of 2 pi v taken directly."""
    batch, length, hidden = shape
    groups = (hidden + 3) // 4
    counter = np.zeros((batch, length, groups, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(groups)
    counter[..., 1] = np.arange(length)[:, None]
    samples = [(sample_offset + b) % 2**32 for b in range(batch)]
    counter[..., 2] = np.array(samples, dtype=np.uint64)[:, None, None]
    counter[..., 3] = stream
    v = (philox(seed, counter) >> np.uint64(9)).astype(np.float64) * 2.0**-23 + 2.0**-24
    if distribution == "uniform":
        noise = 2 * v - 1
    else:
        radius, turns = np.sqrt(-2 * np.log(v[..., 0::2])), 2 * np.pi * v[..., 1::2]
        noise = np.stack((radius * np.cos(turns), radius * np.sin(turns)), axis=-1)
    return torch.from_numpy(noise.reshape(batch, length, 4 * groups)[..., :hidden].copy())


def _groups(level: str, batch: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices (samples, positions) of the tokens of each group."""
    b, s = (index.reshape(-1) for index in np.indices((batch, length)))
    number = {"token": b * length + s, "sequence": b, "batch": 0 * b}[level]
    return [(b[number == n], s[number == n]) for n in np.unique(number)]


def ascend(
    grad: Tensor,
    delta: Tensor,
    *,
    step_size: Tensor | float,
    epsilon: Tensor | float,
    norm: str = "linf",
    normalize: str = "none",
    level: str = "token",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(delta'', clipped (B, S)) in float64: one group at a time, straight from the definition."""
    batch, length, _ = grad.shape
    kept = np.ones((batch, length), dtype=bool) if mask is None else mask.cpu().numpy() != 0
    g, d = grad.detach().cpu().double().numpy(), delta.detach().cpu().double().numpy()

    def by_token(value: Tensor | float) -> np.ndarray:
        value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        value = value.unsqueeze(1) if value.dim() == 1 else value
        return value.expand(batch, length).numpy()

    step, radius = by_token(step_size), by_token(epsilon)
    result, clipped = np.zeros_like(d), np.zeros((batch, length))
    for samples, positions in _groups(level, batch, length):
        inside = kept[samples, positions]
        samples, positions = samples[inside], positions[inside]
        if samples.size == 0 or g.shape[-1] == 0:
            continue
        own, moved = g[samples, positions], d[samples, positions]
        finite = np.isfinite(own).all()
        largest = np.abs(own).max() if finite else 0.0
        if largest >= 2.0**-126:
            scaled = own / largest
            direction = {
                "none": own,
                "linf": scaled,
                "l2": scaled / np.linalg.norm(scaled),
                "sign": np.sign(own),
            }[normalize]
            moved = moved + step[samples, positions][:, None] * direction
        bound = radius[samples, positions][:, None]
        projected = moved
        if norm == "linf":
            projected = np.clip(moved, -bound, bound)
        elif norm == "l2":
            size = np.abs(moved).max()
            size = size * np.linalg.norm(moved / size) if size > 0 else 0.0
            projected = moved * (bound / size) if size > bound.max() else moved
        elif norm == "linf_rescale":
            projected = moved / (np.abs(moved).max() + 1e-6)
        result[samples, positions] = projected
        clipped[samples, positions] = (projected != moved).sum(-1)
    return torch.from_numpy(result), torch.from_numpy(clipped)
