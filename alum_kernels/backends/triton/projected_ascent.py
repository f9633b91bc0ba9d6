"""The Triton kernels of ``projected_ascent``: embeds + Pi(delta + step normalise(g)) in one launch.

Phases, each a reduction over a group's unmasked elements that needs those before it (as in ``csrc/core/ascent.h``):

    1  max|g|, and whether all g are finite     a zero or non-finite gradient takes no step, but is projected
    2  sum (g / max|g|)^2                       normalize = l2
    3  max|delta'|                              norm = l2, linf_rescale
    4  sum (delta' / max|delta'|)^2             norm = l2
    5  write

``_ascend`` gives each program a tile of tokens; at token level groups are the tile's rows. At sequence and batch level
a program goes through all tiles of its group once a phase: one launch, whose parallelism is the number of groups.

    reads   embeds, grad (B, S, H), delta (B, S, H) fp32 or the seed, step, epsilon (B, S) or numbers, mask (B, S)
    writes  embeds + delta'' (B, S, H); delta'' (B, S, H) fp32 and statistics (B, S, 4) fp32 if asked for
"""

import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.elementary import narrowed
from alum_kernels.backends.triton.launch import OPTIONS, on_device, power_of_two
from alum_kernels.backends.triton.noise_init import keeps, noise_tile, per_token, strides

TILE = 2048
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
RESCALE_FLOOR = tl.constexpr(1e-6)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _tile(
    embeds_ptr,
    grad_ptr,
    delta_ptr,
    seed_ptr,
    std_ptr,
    step_ptr,
    mask_ptr,
    std,
    step_size,
    std_stride_batch,
    std_stride_length,
    step_stride_batch,
    step_stride_length,
    mask_stride_batch,
    mask_stride_length,
    first_token,
    first_feature,
    end_token,
    length,
    hidden,
    sample_offset,
    stream,
    NORMAL: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_STD: tl.constexpr,
    HAS_STEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(token, offset, inside, kept, g, delta, step) of ROWS tokens x COLUMNS features; g, delta zero where masked."""
    token = first_token + tl.arange(0, ROWS).to(tl.int64)[:, None]
    batch, position = token // length, token % length
    exists = token < end_token
    kept = keeps(mask_ptr, mask_stride_batch, mask_stride_length, batch, position, exists, HAS_MASK)
    step = per_token(step_ptr, step_size, step_stride_batch, step_stride_length, batch, position, exists, HAS_STEP)
    h = first_feature + tl.arange(0, COLUMNS)[None, :]
    inside = exists & (h < hidden)
    offset = token * hidden + h
    g = tl.load(grad_ptr + offset, mask=inside & kept, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + offset, mask=inside & kept, other=0.0)
    else:
        scale = per_token(std_ptr, std, std_stride_batch, std_stride_length, batch, position, exists, HAS_STD)
        group = first_feature // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        noise = noise_tile(tl.load(seed_ptr), group, batch + sample_offset, position, stream, NORMAL)
        delta = tl.where(inside & kept, scale * noise, 0.0)
    return token, offset, inside, kept, g, delta, step


@triton.jit
def _over_group(x, BY_TOKEN: tl.constexpr, IS_SUM: tl.constexpr):
    """(ROWS, 1) or (1, 1) reduction of a (ROWS, COLUMNS) tile."""
    if IS_SUM:
        by_token = tl.sum(x, 1)[:, None]
        return by_token if BY_TOKEN else tl.sum(by_token, 0)[None, :]
    by_token = tl.max(x, 1)[:, None]
    return by_token if BY_TOKEN else tl.max(by_token, 0)[None, :]


@triton.jit
def _moved(delta, g, step, climbs, largest, grad_length, NORMALIZE: tl.constexpr):
    direction = g
    if NORMALIZE == "sign":
        direction = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
    elif NORMALIZE == "linf":
        direction = tl.div_rn(g, tl.broadcast_to(tl.where(climbs, largest, 1.0), g.shape))
    elif NORMALIZE == "l2":
        direction = tl.div_rn(g, tl.broadcast_to(tl.where(climbs, largest, 1.0), g.shape))
        direction = tl.div_rn(direction, tl.broadcast_to(tl.where(climbs, grad_length, 1.0), g.shape))
    return tl.where(climbs, delta + step * direction, delta)


@triton.jit
def _projected(moved, epsilon, moved_largest, moved_length, NORM: tl.constexpr):
    if NORM == "linf":
        bound = tl.where(moved > epsilon, epsilon, tl.where(moved < -epsilon, -epsilon, moved))
        return tl.where(epsilon == epsilon, bound, epsilon)  # a radius that is NaN gives NaN
    elif NORM == "l2":
        outside = (moved_length > epsilon) | (epsilon != epsilon)
        return tl.where(outside, moved * tl.div_rn(epsilon, tl.where(outside, moved_length, 1.0)), moved)
    elif NORM == "linf_rescale":
        return tl.div_rn(moved, tl.broadcast_to(moved_largest + RESCALE_FLOOR, moved.shape))
    else:
        return moved


@triton.jit
def _ascend(
    embeds_ptr,  # (B, S, H) contiguous
    grad_ptr,  # (B, S, H) contiguous
    delta_ptr,  # (B, S, H) fp32 contiguous
    perturbed_ptr,  # (B, S, H) contiguous
    new_delta_ptr,  # (B, S, H) fp32 contiguous
    stats_ptr,  # (B, S, 4) fp32 contiguous
    seed_ptr,  # (1,) int64
    std_ptr,  # (B, S) fp32
    step_ptr,  # (B, S) fp32
    epsilon_ptr,  # (B, S) fp32
    mask_ptr,  # (B, S) bool or integer
    std,
    step_size,
    epsilon,
    std_stride_batch,
    std_stride_length,
    step_stride_batch,
    step_stride_length,
    epsilon_stride_batch,
    epsilon_stride_length,
    mask_stride_batch,
    mask_stride_length,
    tokens,
    tokens_per_group,
    length,
    hidden,
    sample_offset,
    stream,
    NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    NORMAL: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_STD: tl.constexpr,
    HAS_STEP: tl.constexpr,
    HAS_EPSILON: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WANTS_DELTA: tl.constexpr,
    WANTS_STATS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * tokens_per_group
    end = tl.minimum(begin + tokens_per_group, tokens)
    GROUPS: tl.constexpr = ROWS if BY_TOKEN else 1
    largest = tl.zeros((GROUPS, 1), tl.float32)
    irregular = tl.zeros((GROUPS, 1), tl.float32)
    # tiles are summed in double: equal terms round the same way at every step
    grad_square = tl.zeros((GROUPS, 1), tl.float64)
    moved_largest = tl.zeros((GROUPS, 1), tl.float32)
    moved_square = tl.zeros((GROUPS, 1), tl.float64)
    for first in range(begin, end, ROWS):
        for feature in range(0, hidden, COLUMNS):
            _, _, inside, kept, g, _, _ = _tile(
                embeds_ptr, grad_ptr, grad_ptr, seed_ptr, std_ptr, step_ptr, mask_ptr, std, step_size,
                std_stride_batch, std_stride_length, step_stride_batch, step_stride_length, mask_stride_batch,
                mask_stride_length, first, feature, end, length, hidden, sample_offset, stream,
                NORMAL, True, HAS_STD, HAS_STEP, HAS_MASK, ROWS, COLUMNS,
            )  # fmt: skip
            finite = tl.abs(g) < INFINITY
            largest = tl.maximum(largest, _over_group(tl.where(finite, tl.abs(g), 0.0), BY_TOKEN, False))
            irregular += _over_group(tl.where(finite, 0.0, 1.0), BY_TOKEN, True)
    climbs = (irregular == 0.0) & (largest >= SMALLEST_NORMAL)

    if NORMALIZE == "l2":
        divisor = tl.where(climbs, largest, 1.0)
        for first in range(begin, end, ROWS):
            for feature in range(0, hidden, COLUMNS):
                _, _, inside, kept, g, _, _ = _tile(
                    embeds_ptr, grad_ptr, grad_ptr, seed_ptr, std_ptr, step_ptr, mask_ptr, std, step_size,
                    std_stride_batch, std_stride_length, step_stride_batch, step_stride_length, mask_stride_batch,
                    mask_stride_length, first, feature, end, length, hidden, sample_offset, stream,
                    NORMAL, True, HAS_STD, HAS_STEP, HAS_MASK, ROWS, COLUMNS,
                )  # fmt: skip
                ratio = tl.where(climbs, tl.div_rn(g, tl.broadcast_to(divisor, g.shape)), 0.0)
                grad_square += _over_group(ratio * ratio, BY_TOKEN, True)
    grad_length = tl.sqrt_rn(grad_square.to(tl.float32))

    if (NORM == "l2") | (NORM == "linf_rescale"):
        for first in range(begin, end, ROWS):
            for feature in range(0, hidden, COLUMNS):
                _, _, inside, kept, g, delta, step = _tile(
                    embeds_ptr, grad_ptr, delta_ptr, seed_ptr, std_ptr, step_ptr, mask_ptr, std, step_size,
                    std_stride_batch, std_stride_length, step_stride_batch, step_stride_length, mask_stride_batch,
                    mask_stride_length, first, feature, end, length, hidden, sample_offset, stream,
                    NORMAL, HAS_DELTA, HAS_STD, HAS_STEP, HAS_MASK, ROWS, COLUMNS,
                )  # fmt: skip
                moved = _moved(delta, g, step, climbs, largest, grad_length, NORMALIZE)
                moved_largest = tl.maximum(moved_largest, _over_group(tl.abs(moved), BY_TOKEN, False))
    if NORM == "l2":
        divisor = tl.where(moved_largest > 0.0, moved_largest, 1.0)
        for first in range(begin, end, ROWS):
            for feature in range(0, hidden, COLUMNS):
                _, _, inside, kept, g, delta, step = _tile(
                    embeds_ptr, grad_ptr, delta_ptr, seed_ptr, std_ptr, step_ptr, mask_ptr, std, step_size,
                    std_stride_batch, std_stride_length, step_stride_batch, step_stride_length, mask_stride_batch,
                    mask_stride_length, first, feature, end, length, hidden, sample_offset, stream,
                    NORMAL, HAS_DELTA, HAS_STD, HAS_STEP, HAS_MASK, ROWS, COLUMNS,
                )  # fmt: skip
                moved = _moved(delta, g, step, climbs, largest, grad_length, NORMALIZE)
                ratio = tl.div_rn(moved, tl.broadcast_to(divisor, moved.shape))
                moved_square += _over_group(ratio * ratio, BY_TOKEN, True)
    moved_length = moved_largest * tl.sqrt_rn(moved_square.to(tl.float32))

    for first in range(begin, end, ROWS):
        squares = tl.zeros((ROWS, 1), tl.float32)
        clipped = tl.zeros((ROWS, 1), tl.float32)
        lost = tl.zeros((ROWS, 1), tl.float32)
        non_finite = tl.zeros((ROWS, 1), tl.float32)
        for feature in range(0, hidden, COLUMNS):
            token, offset, inside, kept, g, delta, step = _tile(
                embeds_ptr, grad_ptr, delta_ptr, seed_ptr, std_ptr, step_ptr, mask_ptr, std, step_size,
                std_stride_batch, std_stride_length, step_stride_batch, step_stride_length, mask_stride_batch,
                mask_stride_length, first, feature, end, length, hidden, sample_offset, stream,
                NORMAL, HAS_DELTA, HAS_STD, HAS_STEP, HAS_MASK, ROWS, COLUMNS,
            )  # fmt: skip
            batch, position = token // length, token % length
            radius = per_token(
                epsilon_ptr, epsilon, epsilon_stride_batch, epsilon_stride_length, batch, position, token < end,
                HAS_EPSILON,
            )  # fmt: skip
            moved = _moved(delta, g, step, climbs, largest, grad_length, NORMALIZE)
            projected = tl.where(kept, _projected(moved, radius, moved_largest, moved_length, NORM), 0.0)
            embeds = tl.load(embeds_ptr + offset, mask=inside, other=0.0)
            perturbed = narrowed(embeds.to(tl.float32) + projected, embeds.dtype)
            tl.store(perturbed_ptr + offset, perturbed, mask=inside)
            if WANTS_DELTA:
                tl.store(new_delta_ptr + offset, projected, mask=inside)
            if WANTS_STATS:
                counted = inside & kept
                squares += tl.sum(tl.where(counted, projected * projected, 0.0), 1)[:, None]
                clipped += tl.sum(tl.where(counted & (projected != moved), 1.0, 0.0), 1)[:, None]
                # as numbers: the interpreter compares bf16 by bits, NaN included
                same = (perturbed.to(tl.float32) == embeds.to(tl.float32)) & (projected != 0.0)
                lost += tl.sum(tl.where(counted & same, 1.0, 0.0), 1)[:, None]
                non_finite += tl.sum(tl.where(counted & (tl.abs(g) < INFINITY), 0.0, tl.where(counted, 1.0, 0.0)), 1)[
                    :, None
                ]
        if WANTS_STATS:
            row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
            tl.store(stats_ptr + row * 4, squares, mask=row < end)
            tl.store(stats_ptr + row * 4 + 1, clipped, mask=row < end)
            tl.store(stats_ptr + row * 4 + 2, lost, mask=row < end)
            tl.store(stats_ptr + row * 4 + 3, non_finite, mask=row < end)


def projected_ascent(
    embeds: Tensor,  # (B, S, H) contiguous
    grad: Tensor,  # (B, S, H) contiguous
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
    if embeds.numel() == 0:
        return
    batch, length, hidden = embeds.shape
    columns = max(4, min(power_of_two(hidden), TILE))
    rows = TILE // columns
    tokens_per_group = {"token": rows, "sequence": length, "batch": batch * length}[level]
    with on_device(embeds):
        _ascend[(triton.cdiv(batch * length, tokens_per_group),)](
            embeds,
            grad,
            delta,
            perturbed,
            new_delta,
            stats,
            seed,
            std_per_token,
            step_per_token,
            epsilon_per_token,
            mask,
            std,
            step_size,
            epsilon,
            *strides(std_per_token),
            *strides(step_per_token),
            *strides(epsilon_per_token),
            *strides(mask),
            batch * length,
            tokens_per_group,
            length,
            hidden,
            sample_offset,
            stream,
            NORM=norm,
            NORMALIZE=normalize,
            BY_TOKEN=level == "token",
            NORMAL=distribution == "normal",
            HAS_DELTA=delta is not None,
            HAS_STD=std_per_token is not None,
            HAS_STEP=step_per_token is not None,
            HAS_EPSILON=epsilon_per_token is not None,
            HAS_MASK=mask is not None,
            WANTS_DELTA=new_delta.numel() > 0,
            WANTS_STATS=stats.numel() > 0,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            **OPTIONS,
        )
