"""Rows that are read in blocks, in one sweep. Counterpart of ``csrc/core/long_row.h``.

The running sums of the stream, with w2 = e^(b - M), w1 = w2 e^d, d = (a - b) - c, M and c at the largest b so far:
L1 = sum w1, L2 = sum w2, B = sum (w1 - w2), P = sum w1 d, A = sum w2 d, C = sum (w1 - w2) d. When a block raises the
largest b, then with D = c_new - c, and after scaling all by e^(M - M_new), in this order:

    B' = e^-D B + expm1(-D) L2      C' = e^-D C + expm1(-D) A - D B'      A' = A - D L2      P' = e^-D (P - D L1)
    L1' = e^-D L1
"""

import triton
import triton.language as tl

from alum_kernels.backends.triton.divergence import (
    INFINITY,
    LOWEST,
    NARROW,
    NO_WEIGHT,
    SERIES,
    class_gradient,
    row_offset,
    settled,
    weights,
)
from alum_kernels.backends.triton.elementary import exp_sum, expm1, g_series, log, log1p, narrowed


@triton.jit
def _block(a_ptr, b_ptr, start, columns, BLOCK: tl.constexpr):
    """Columns [start, start + BLOCK) of a row; those beyond it are -inf on both sides."""
    column = start + tl.arange(0, BLOCK)
    inside = column < columns
    a = tl.load(a_ptr + column, mask=inside, other=-INFINITY).to(tl.float32)
    b = tl.load(b_ptr + column, mask=inside, other=-INFINITY).to(tl.float32)
    return column, a, b


@triton.jit
def stream_rows(
    a_ptr,  # (O, I, V)
    b_ptr,  # (O, I, V)
    weight_ptr,  # (O, I) fp32
    loss_ptr,  # (N,) fp32
    stats_ptr,  # (5, N) fp32
    grad_ptr,  # (N, V)
    rows,
    columns,
    inner,
    a_stride_outer,
    a_stride_inner,
    b_stride_outer,
    b_stride_inner,
    weight_stride_outer,
    weight_stride_inner,
    inv_temperature,
    grad_scale,
    DIVERGENCE: tl.constexpr,
    CONVENTION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_STATS: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row_offset(row, inner, weight_stride_outer, weight_stride_inner))
    a_row = a_ptr + row_offset(row, inner, a_stride_outer, a_stride_inner)
    b_row = b_ptr + row_offset(row, inner, b_stride_outer, b_stride_inner)
    length = tl.where(weight != 0.0, columns, 0)

    max_a = tl.full((), -INFINITY, tl.float32)
    max_b = tl.full((), -INFINITY, tl.float32)
    c = tl.full((), 0.0, tl.float32)
    l1 = tl.full((), 0.0, tl.float64)
    l2 = tl.full((), 0.0, tl.float64)
    sum_a = tl.full((), 0.0, tl.float64)
    sum_b = tl.full((), 0.0, tl.float64)
    sum_c = tl.full((), 0.0, tl.float64)
    sum_p = tl.full((), 0.0, tl.float64)
    wide = tl.full((), 0, tl.int32)
    irregular = tl.full((), 0, tl.int32)
    one_sided = tl.full((), 0, tl.int32)
    alive = tl.full((), 0, tl.int32)
    for start in range(0, length, BLOCK):
        column, a, b = _block(a_row, b_row, start, columns, BLOCK)
        regular = (a < INFINITY) & (b < INFINITY)
        half_dead = (a == -INFINITY) != (b == -INFINITY)
        irregular = tl.maximum(irregular, tl.max(tl.where(regular, 0, 1), 0))
        one_sided = tl.maximum(one_sided, tl.max(tl.where(half_dead, 1, 0), 0))
        dead = (b == -INFINITY) | half_dead | (regular == 0)
        alive = tl.maximum(alive, tl.max(tl.where(dead, 0, 1), 0))
        a, b = tl.where(dead, LOWEST, a), tl.where(dead, LOWEST, b)
        apart = tl.where(dead, 0.0, a - b)
        block_b = tl.max(b, 0)
        block_c = tl.sum(tl.where(column == start + tl.argmax(b, 0), apart, 0.0), 0)
        grows = block_b > max_b
        new_b, new_c = tl.where(grows, block_b, max_b), tl.where(grows, block_c, c)
        max_a = tl.maximum(max_a, tl.max(a, 0))

        # bring the sums so far to the new largest b; those that vanish against it are dropped, whatever they hold
        shift = (new_c - c) * inv_temperature
        fall = exp_sum((max_b - new_b) * inv_temperature, shift * 0.0)
        kept = (fall > 0.0) & (max_b > -INFINITY)
        wide = tl.where(kept, tl.where(tl.abs(shift) > NARROW, 1, wide), 0)
        shift = tl.where(kept & (tl.abs(shift) <= NARROW), shift, 0.0)
        fall = tl.where(kept, fall, 0.0).to(tl.float64)
        lift, change = exp_sum(-shift, shift * 0.0).to(tl.float64), expm1(-shift).to(tl.float64)
        shift64 = shift.to(tl.float64)
        new_sum_b = fall * (lift * sum_b + change * l2)
        sum_c = fall * (lift * sum_c + change * sum_a) - shift64 * new_sum_b
        sum_a = fall * (sum_a - shift64 * l2)
        sum_p = fall * lift * (sum_p - shift64 * l1)
        l1, l2, sum_b = fall * lift * l1, fall * l2, new_sum_b
        max_b, c = new_b, new_c

        wide = tl.where(((max_a - max_b) - c) * inv_temperature > NARROW, 1, wide)
        d = tl.where(dead, 0.0, (apart - c) * inv_temperature)
        bounded = tl.minimum(d, 2.0 * NARROW)  # beyond, the row is wide, or the class weighs nothing
        w1, w2, difference = weights(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), d * 0.0, bounded)
        l1 += tl.sum(w1, 0).to(tl.float64)
        l2 += tl.sum(w2, 0).to(tl.float64)
        sum_p += tl.sum(w1 * d, 0).to(tl.float64)
        sum_a += tl.sum(w2 * d, 0).to(tl.float64)
        sum_b += tl.sum(difference, 0).to(tl.float64)
        sum_c += tl.sum(difference * d, 0).to(tl.float64)

    undefined = (irregular != 0) | (one_sided != 0) | (alive == 0)
    if (wide != 0) & (undefined == 0):
        # one side underflows against the other: a maximum for each
        l1 = tl.full((), 0.0, tl.float64)
        l2 = tl.full((), 0.0, tl.float64)
        sum_a = tl.full((), 0.0, tl.float64)
        sum_p = tl.full((), 0.0, tl.float64)
        for start in range(0, length, BLOCK):
            column, a, b = _block(a_row, b_row, start, columns, BLOCK)
            dead = b == -INFINITY
            d = tl.where(dead, 0.0, ((a - b) - c) * inv_temperature)
            w1 = exp_sum(tl.where(dead, NO_WEIGHT, (a - max_a) * inv_temperature), d * 0.0)
            w2 = exp_sum(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), d * 0.0)
            l1 += tl.sum(w1, 0).to(tl.float64)
            l2 += tl.sum(w2, 0).to(tl.float64)
            sum_a += tl.sum(w2 * d, 0).to(tl.float64)
            sum_p += tl.sum(w1 * d, 0).to(tl.float64)

    l1, l2 = tl.where(undefined | (l1 <= 0.0), 1.0, l1), tl.where(undefined | (l2 <= 0.0), 1.0, l2)
    mean_p, mean_q = sum_p / l1, sum_a / l2
    gap = (max_a.to(tl.float64) - max_b.to(tl.float64) - c.to(tl.float64)) * inv_temperature
    change = tl.where((wide != 0) | undefined, 0.0, sum_b / l2).to(tl.float32)
    own = log((l1 / l2).to(tl.float32))
    near = log1p(tl.where(change > -0.5, change, 0.0))
    log_ratio = tl.where(wide != 0, gap.to(tl.float32) + own, tl.where(change > -0.5, near, own))
    loss = tl.where(wide != 0, mean_p - mean_q, sum_c / l1 - mean_q * (sum_b / l1)).to(tl.float32)
    lse_b = max_b * inv_temperature + log(l2.to(tl.float32))
    mean_p, mean_q = mean_p.to(tl.float32), mean_q.to(tl.float32)

    if DIVERGENCE == "kl":
        # as a value KL(q||p) is a sum of terms >= 0, with Lambda known
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, length, BLOCK):
            column, a, b = _block(a_row, b_row, start, columns, BLOCK)
            dead = (b == -INFINITY) | (undefined != 0)
            u = tl.where(dead, 0.0, ((a - b) - c) * inv_temperature - log_ratio)
            w1, w2, difference = weights(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), u * 0.0, u)
            near_u = tl.abs(u) < SERIES
            term = tl.where(near_u, w2 * g_series(tl.where(near_u, u, 0.0)), difference - w2 * u)
            total += tl.sum(term, 0).to(tl.float64)
        loss = (total / l2).to(tl.float32)

    loss = tl.where(undefined, tl.where((irregular == 0) & (one_sided != 0), INFINITY, float("nan")), loss)
    tl.store(loss_ptr + row, tl.where(weight != 0.0, loss, 0.0))
    if WANTS_STATS:
        tl.store(stats_ptr + row, tl.where(undefined, float("nan"), lse_b))
        tl.store(stats_ptr + rows + row, c)
        tl.store(stats_ptr + 2 * rows + row, log_ratio)
        tl.store(stats_ptr + 3 * rows + row, mean_p)
        tl.store(stats_ptr + 4 * rows + row, mean_q)
    if WANTS_GRADIENT:
        upstream = weight * grad_scale * inv_temperature
        for start in range(0, columns, BLOCK):
            column, a, b = _block(a_row, b_row, start, length, BLOCK)
            da, _ = class_gradient(a, b, lse_b, c, log_ratio, mean_p, mean_q, inv_temperature, DIVERGENCE, CONVENTION)
            da = settled(da, upstream + da * 0.0, undefined)
            tl.store(grad_ptr + row * columns + column, narrowed(da, grad_ptr.dtype.element_ty), mask=column < columns)
