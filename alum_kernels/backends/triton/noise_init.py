"""The Triton kernel of ``noise_init``, and the tile of noise that the ascent draws again.

    words   = Philox4x32-10(key = seed, counter = (h // 4, s, sample_offset + b, stream)), lane h % 4
    v       = (word >> 9) 2^-23 + 2^-24
    uniform = std (2 v - 1);  normal = std sqrt(-2 ln v_0) (cos, sin)(2 pi v_1) on lanes (0, 1), likewise on (2, 3)

Counters are cast to uint32: with wider ones ``tl.philox`` silently is Philox4x64.

    reads   embeds (B, S, H), seed (1,), std (B, S) or a number, mask (B, S)
    writes  embeds + delta_0 (B, S, H), delta_0 (B, S, H) if asked for
"""

import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.elementary import ROUND, cos_quarter, log, narrowed, sin_quarter
from alum_kernels.backends.triton.launch import OPTIONS, on_device

BLOCK = 1024


@triton.jit
def _unit_interval(word):
    return (word >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08


@triton.jit
def _box_muller(v0, v1):
    """Two standard normals; the quadrant is taken off exactly before cosine and sine."""
    radius = tl.sqrt_rn(-2.0 * log(v0))
    turns = 4.0 * v1
    shifted = turns + ROUND
    quadrant = shifted.to(tl.int32, bitcast=True) & 3
    f = turns - (shifted - ROUND)
    c, s = radius * cos_quarter(f), radius * sin_quarter(f)
    odd = (quadrant & 1) != 0
    first, second = tl.where(odd, -s, c), tl.where(odd, c, s)
    negative = (quadrant & 2) != 0
    return tl.where(negative, -first, first), tl.where(negative, -second, second)


@triton.jit
def noise_tile(
    seed,  # int64 scalar
    group,  # (1, C / 4) h // 4
    sample,  # (R, 1) sample_offset + b
    position,  # (R, 1) s
    stream,
    NORMAL: tl.constexpr,
):
    """(R, C) unit noise of C neighbouring features, from h a multiple of four."""
    zero = (group + position).to(tl.uint32) * 0
    c0, c1 = zero + group.to(tl.uint32), zero + position.to(tl.uint32)
    c2, c3 = zero + sample.to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    v0, v1, v2, v3 = _unit_interval(w0), _unit_interval(w1), _unit_interval(w2), _unit_interval(w3)
    if NORMAL:
        x0, x1 = _box_muller(v0, v1)
        x2, x3 = _box_muller(v2, v3)
    else:
        x0, x1, x2, x3 = 2.0 * v0 - 1.0, 2.0 * v1 - 1.0, 2.0 * v2 - 1.0, 2.0 * v3 - 1.0
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def per_token(pointer, value, stride_batch, stride_length, batch, position, valid, HAS: tl.constexpr):
    """A magnitude of each token: loaded from a (B, S) view, or the one number."""
    result = tl.full(batch.shape, 0.0, tl.float32) + value
    if HAS:
        result = tl.load(pointer + batch * stride_batch + position * stride_length, mask=valid, other=0.0)
    return result


@triton.jit
def keeps(pointer, stride_batch, stride_length, batch, position, valid, HAS: tl.constexpr):
    """Whether a token exists and is not masked."""
    kept = valid
    if HAS:
        kept = valid & (tl.load(pointer + batch * stride_batch + position * stride_length, mask=valid, other=0) != 0)
    return kept


@triton.jit
def _noise_init(
    embeds_ptr,  # (B, S, H) contiguous
    perturbed_ptr,  # (B, S, H) contiguous
    delta_ptr,  # (B, S, H) fp32 contiguous
    seed_ptr,  # (1,) int64
    std_ptr,  # (B, S) fp32
    mask_ptr,  # (B, S) bool or integer
    std,
    std_stride_batch,
    std_stride_length,
    mask_stride_batch,
    mask_stride_length,
    length,
    hidden,
    sample_offset,
    stream,
    NORMAL: tl.constexpr,
    HAS_STD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    batch, position = token // length, token % length
    exists = token >= 0
    scale = per_token(std_ptr, std, std_stride_batch, std_stride_length, batch, position, exists, HAS_STD)
    kept = keeps(mask_ptr, mask_stride_batch, mask_stride_length, batch, position, exists, HAS_MASK)
    first = tl.program_id(1) * BLOCK
    h = first + tl.arange(0, BLOCK)[None, :]
    group = first // 4 + tl.arange(0, BLOCK // 4)[None, :]
    noise = noise_tile(tl.load(seed_ptr), group, batch + sample_offset, position, stream, NORMAL)
    delta = tl.where(kept, scale * noise, 0.0)
    inside = h < hidden
    offset = token * hidden + h
    embeds = tl.load(embeds_ptr + offset, mask=inside, other=0.0)
    tl.store(perturbed_ptr + offset, narrowed(embeds.to(tl.float32) + delta, embeds.dtype), mask=inside)
    if HAS_DELTA:
        tl.store(delta_ptr + offset, delta, mask=inside)


def strides(view: Tensor | None) -> tuple[int, int]:
    """Strides of an optional (B, S) view."""
    return (0, 0) if view is None else (view.stride(0), view.stride(1))


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
    if embeds.numel() == 0:
        return
    batch, length, hidden = embeds.shape
    with on_device(embeds):
        _noise_init[(batch * length, triton.cdiv(hidden, BLOCK))](
            embeds,
            perturbed,
            delta,
            seed,
            std_per_token,
            mask,
            std,
            *strides(std_per_token),
            *strides(mask),
            length,
            hidden,
            sample_offset,
            stream,
            NORMAL=distribution == "normal",
            HAS_STD=std_per_token is not None,
            HAS_MASK=mask is not None,
            HAS_DELTA=delta.numel() > 0,
            BLOCK=BLOCK,
            num_warps=4,
            **OPTIONS,
        )
