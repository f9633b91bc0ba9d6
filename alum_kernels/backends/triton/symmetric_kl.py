"""The Triton kernels of ``symmetric_kl`` and ``kl``. Formulas: ``csrc/core/divergence.h``.

    _tile_rows     rows of up to 2,048 classes in registers: three sweeps over values that were read once
    _stream_rows   longer rows, in blocks: one sweep that keeps running sums against the largest b seen so far
                   (and a second one where a side underflows against the other)
    _gradient      from the five floats of each row, element by element

Both loss kernels write the gradient of a in the same launch where it is wanted; the stream reads its row again for it.

    reads   a, b (O, I, V) fp32/bf16/fp16; row_weight (O, I) fp32; statistics (5, O, I), grad_rows (O, I) fp32
    writes  loss (O, I) fp32, statistics (5, O, I) fp32; da, db (O, I, V). Nothing else is as large as the logits.

The running sums of the stream, with w2 = e^(b - M), w1 = w2 e^d, d = (a - b) - c, M and c at the largest b so far:
L1 = sum w1, L2 = sum w2, B = sum (w1 - w2), P = sum w1 d, A = sum w2 d, C = sum (w1 - w2) d. When a block raises the
largest b, then with D = c_new - c, and after scaling all by e^(M - M_new), in this order:

    B' = e^-D B + expm1(-D) L2      C' = e^-D C + expm1(-D) A - D B'      A' = A - D L2      P' = e^-D (P - D L1)
    L1' = e^-D L1
"""

import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.elementary import (
    exp_parts,
    exp_sum,
    expm1,
    g_series,
    log,
    log1p,
    narrowed,
)
from alum_kernels.backends.triton.launch import OPTIONS, on_device, power_of_two

TILE_COLUMNS = 2048
"""Up to here a row is held in registers."""

STREAM_BLOCK, STREAM_WARPS = 8192, 16
"""Columns of a streamed block, and the warps that no architecture spills with."""

GRADIENT_BLOCK = 4096
"""Elements of a program of the gradient kernel."""

INFINITY = tl.constexpr(float("inf"))
NARROW = tl.constexpr(30.0)
SERIES = tl.constexpr(0.3)
# e^x is zero here: the scale is 2^-127, whose bits are those of zero
VANISHED = tl.constexpr(-88.2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_WEIGHT = tl.constexpr(-1e30)


@triton.jit
def _row_offset(row, inner, stride_outer, stride_inner):
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def _difference(a, b):
    """(high, low) with high + low = a - b exactly: additions only, which no fusing touches."""
    high = a - b
    moved = high - a
    return high, (a - (high - moved)) - (b + moved)


@triton.jit
def _weights_below(larger, d):
    """(w1, w2, w1 - w2) with w1 = w2 e^d, from the larger of the two, whatever the sign and size of d."""
    up = d > 0.0
    fall = -tl.abs(d)
    scale, m = exp_parts(tl.where(fall > VANISHED, fall, VANISHED), d * 0.0)
    smaller = larger * (scale * m + scale)
    loss = larger * (scale * m + (scale - 1.0))
    return tl.where(up, larger, smaller), tl.where(up, smaller, larger), tl.where(up, -loss, loss)


@triton.jit
def _weights(high, low, d):
    """The same from log w2 = high + low."""
    return _weights_below(exp_sum(high, low + tl.where(d > 0.0, d, 0.0)), d)


@triton.jit
def _gradient_of(w1, w2, difference, d, mean_p, mean_q, DIVERGENCE: tl.constexpr, CONVENTION: tl.constexpr):
    """(da, db) before the upstream factor."""
    if DIVERGENCE == "kl":
        da = difference
        db = -w2 * (d - mean_q) if CONVENTION == "full" else difference * 0.0
    else:
        if CONVENTION == "detach_targets":
            da, db = difference, -difference
        else:
            da = difference + w1 * (d - mean_p)
            db = -difference - w2 * (d - mean_q)
    return da, db


@triton.jit
def _class_gradient(
    a, b, lse_b, c, log_ratio, mean_p, mean_q, inv_temperature, DIVERGENCE: tl.constexpr, CONVENTION: tl.constexpr
):
    """(da, db) of classes from the statistics of their rows; zero for classes that are -inf on both sides."""
    dead = b == -INFINITY
    d = tl.where(dead, 0.0, ((a - b) - c) * inv_temperature)
    w1, w2, difference = _weights(tl.where(dead, NO_WEIGHT, b * inv_temperature), -lse_b, d - log_ratio)
    da, db = _gradient_of(w1, w2, difference, d, mean_p, mean_q, DIVERGENCE, CONVENTION)
    return tl.where(dead, 0.0, da), tl.where(dead, 0.0, db)


@triton.jit
def _settled(gradient, upstream, undefined):
    """The gradient as it is stored: zero without upstream, NaN for a row that has none."""
    return tl.where(upstream == 0.0, 0.0, tl.where(undefined, float("nan"), gradient * upstream))


@triton.jit
def _tile_rows(
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    exists = row < rows
    inside = exists & (column < columns)
    weight = tl.full((ROWS, 1), 1.0, tl.float32)
    if HAS_WEIGHT:
        offset = _row_offset(row, inner, weight_stride_outer, weight_stride_inner)
        weight = tl.load(weight_ptr + offset, mask=exists, other=0.0)
    wanted = inside & (weight != 0.0)
    a_at = a_ptr + _row_offset(row, inner, a_stride_outer, a_stride_inner) + column
    b_at = b_ptr + _row_offset(row, inner, b_stride_outer, b_stride_inner) + column
    a = tl.load(a_at, mask=wanted, other=-INFINITY).to(tl.float32)
    b = tl.load(b_at, mask=wanted, other=-INFINITY).to(tl.float32)

    irregular = tl.max(tl.where((a < INFINITY) & (b < INFINITY), 0, 1), 1)[:, None] != 0
    one_sided = tl.max(tl.where((a == -INFINITY) != (b == -INFINITY), 1, 0), 1)[:, None] != 0
    dead = (b == -INFINITY) | irregular | one_sided
    none_alive = tl.min(tl.where(dead, 1, 0), 1)[:, None] != 0
    a, b = tl.where(dead, LOWEST, a), tl.where(dead, LOWEST, b)

    # sweep 1: the largest b and the difference there
    max_a, max_b = tl.max(a, 1)[:, None], tl.max(b, 1)[:, None]
    top = column == tl.argmax(b, 1)[:, None]
    high, low = _difference(a, b)
    c_high = tl.sum(tl.where(top, high, 0.0), 1)[:, None]
    c_low = tl.sum(tl.where(top, low, 0.0), 1)[:, None]
    d = tl.where(dead, 0.0, ((high - c_high) + (low - c_low)) * inv_temperature)
    apart_high, apart_low = _difference(max_a, max_b)
    gap = ((apart_high - c_high) + (apart_low - c_low)) * inv_temperature

    # sweep 2: both sums of weights, and Lambda
    below_high, below_low = _difference(a, max_a)
    weight_a = tl.where(dead, 0.0, exp_sum(below_high * inv_temperature, below_low * inv_temperature))
    below_high, below_low = _difference(b, max_b)
    weight_b = tl.where(dead, 0.0, exp_sum(below_high * inv_temperature, below_low * inv_temperature))
    l1, l2 = tl.sum(weight_a, 1)[:, None], tl.sum(weight_b, 1)[:, None]
    l1, l2 = tl.where(none_alive, 1.0, l1), tl.where(none_alive, 1.0, l2)
    lift = exp_sum(tl.minimum(gap, NARROW), gap * 0.0)
    _, _, difference = _weights_below(tl.where(d > 0.0, weight_a * lift, weight_b), d)
    change = tl.div_rn(tl.sum(difference, 1)[:, None], l2)
    near = (gap <= NARROW) & (change > -0.5)
    log_ratio = tl.where(near, log1p(tl.where(near, change, 0.0)), gap + log(tl.div_rn(l1, l2)))

    # sweep 3: the divergence, term by term, and what the gradient needs
    u = d - log_ratio
    one = l1 * 0.0 + 1.0
    larger = tl.where(u > 0.0, weight_a * tl.div_rn(one, l1), weight_b * tl.div_rn(one, l2))
    w1, w2, difference = _weights_below(larger, u)
    if DIVERGENCE == "kl":
        near_u = tl.abs(u) < SERIES
        term = tl.where(near_u, w2 * g_series(tl.where(near_u, u, 0.0)), difference - w2 * u)
    else:
        term = difference * u
    loss = tl.sum(tl.where(dead, 0.0, term), 1)[:, None]
    mean_p, mean_q = tl.sum(w1 * d, 1)[:, None], tl.sum(w2 * d, 1)[:, None]

    loss = tl.where(one_sided, INFINITY, loss)
    loss = tl.where(irregular | none_alive & (one_sided == 0), float("nan"), loss)
    undefined = irregular | one_sided | none_alive
    lse_b = max_b * inv_temperature + log(l2)
    tl.store(loss_ptr + row, tl.where(weight != 0.0, loss, 0.0), mask=exists)
    if WANTS_STATS:
        tl.store(stats_ptr + row, tl.where(undefined, float("nan"), lse_b), mask=exists)
        tl.store(stats_ptr + rows + row, c_high, mask=exists)
        tl.store(stats_ptr + 2 * rows + row, log_ratio, mask=exists)
        tl.store(stats_ptr + 3 * rows + row, mean_p, mask=exists)
        tl.store(stats_ptr + 4 * rows + row, mean_q, mask=exists)
    if WANTS_GRADIENT:
        da, _ = _gradient_of(w1, w2, difference, d, mean_p, mean_q, DIVERGENCE, CONVENTION)
        upstream = weight * grad_scale * inv_temperature
        da = _settled(tl.where(dead, 0.0, da), upstream + da * 0.0, undefined)
        tl.store(grad_ptr + row * columns + column, narrowed(da, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block(a_ptr, b_ptr, start, columns, BLOCK: tl.constexpr):
    """Columns [start, start + BLOCK) of a row; those beyond it are -inf on both sides."""
    column = start + tl.arange(0, BLOCK)
    inside = column < columns
    a = tl.load(a_ptr + column, mask=inside, other=-INFINITY).to(tl.float32)
    b = tl.load(b_ptr + column, mask=inside, other=-INFINITY).to(tl.float32)
    return column, a, b


@triton.jit
def _stream_rows(
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
        weight = tl.load(weight_ptr + _row_offset(row, inner, weight_stride_outer, weight_stride_inner))
    a_row = a_ptr + _row_offset(row, inner, a_stride_outer, a_stride_inner)
    b_row = b_ptr + _row_offset(row, inner, b_stride_outer, b_stride_inner)
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
        w1, w2, difference = _weights(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), d * 0.0, bounded)
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
            w1, w2, difference = _weights(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), u * 0.0, u)
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
            da, _ = _class_gradient(a, b, lse_b, c, log_ratio, mean_p, mean_q, inv_temperature, DIVERGENCE, CONVENTION)
            da = _settled(da, upstream + da * 0.0, undefined)
            tl.store(grad_ptr + row * columns + column, narrowed(da, grad_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _gradient(
    a_ptr,  # (O, I, V)
    b_ptr,  # (O, I, V)
    stats_ptr,  # (5, N) fp32
    upstream_ptr,  # (O, I) fp32
    grad_a_ptr,  # (N, V)
    grad_b_ptr,  # (N, V)
    rows,
    columns,
    inner,
    a_stride_outer,
    a_stride_inner,
    b_stride_outer,
    b_stride_inner,
    upstream_stride_outer,
    upstream_stride_inner,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    CONVENTION: tl.constexpr,
    WANTS_A: tl.constexpr,
    WANTS_B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = row < rows
    inside = exists & (column < columns)
    offset = _row_offset(row, inner, upstream_stride_outer, upstream_stride_inner)
    upstream = tl.load(upstream_ptr + offset, mask=exists, other=0.0) * inv_temperature
    lse_b = tl.load(stats_ptr + row, mask=exists, other=0.0)
    c = tl.load(stats_ptr + rows + row, mask=exists, other=0.0)
    log_ratio = tl.load(stats_ptr + 2 * rows + row, mask=exists, other=0.0)
    mean_p = tl.load(stats_ptr + 3 * rows + row, mask=exists, other=0.0)
    mean_q = tl.load(stats_ptr + 4 * rows + row, mask=exists, other=0.0)
    wanted = inside & (upstream != 0.0)
    a_at = a_ptr + _row_offset(row, inner, a_stride_outer, a_stride_inner) + column
    b_at = b_ptr + _row_offset(row, inner, b_stride_outer, b_stride_inner) + column
    a = tl.load(a_at, mask=wanted, other=-INFINITY).to(tl.float32)
    b = tl.load(b_at, mask=wanted, other=-INFINITY).to(tl.float32)
    undefined = lse_b != lse_b
    usable = tl.where(undefined, 0.0, lse_b)
    da, db = _class_gradient(
        tl.where(undefined, -INFINITY, a),
        tl.where(undefined, -INFINITY, b),
        usable,
        c,
        log_ratio,
        mean_p,
        mean_q,
        inv_temperature,
        DIVERGENCE,
        CONVENTION,
    )
    at = row * columns + column
    if WANTS_A:
        da = _settled(da, upstream + da * 0.0, undefined)
        tl.store(grad_a_ptr + at, narrowed(da, grad_a_ptr.dtype.element_ty), mask=inside)
    if WANTS_B:
        db = _settled(db, upstream + db * 0.0, undefined)
        tl.store(grad_b_ptr + at, narrowed(db, grad_b_ptr.dtype.element_ty), mask=inside)


def _launch_rows(
    a: Tensor,
    b: Tensor,
    row_weight: Tensor | None,
    rows: Tensor,
    statistics: Tensor | None,
    grad_a: Tensor | None,
    divergence: str,
    gradient: str,
    inv_temperature: float,
    grad_scale: float,
) -> None:
    """Launch the loss kernel that fits the length of the rows."""
    count, columns = a.shape[0] * a.shape[1], a.shape[2]
    if count == 0:
        return
    weight_strides = (0, 0) if row_weight is None else row_weight.stride()
    arguments = (
        a,
        b,
        row_weight,
        rows,
        statistics,
        grad_a,
        count,
        columns,
        a.shape[1],
        *a.stride()[:2],
        *b.stride()[:2],
        *weight_strides,
        inv_temperature,
        grad_scale,
    )
    options = {
        "DIVERGENCE": divergence,
        "CONVENTION": gradient,
        "HAS_WEIGHT": row_weight is not None,
        "WANTS_STATS": statistics is not None,
        "WANTS_GRADIENT": grad_a is not None,
        **OPTIONS,
    }
    with on_device(a):
        if columns <= TILE_COLUMNS:
            width = power_of_two(columns)
            height = min(max(TILE_COLUMNS // width, 1), 256)
            _tile_rows[(triton.cdiv(count, height),)](*arguments, ROWS=height, COLUMNS=width, num_warps=4, **options)
        else:
            _stream_rows[(count,)](*arguments, BLOCK=STREAM_BLOCK, num_warps=STREAM_WARPS, **options)


def loss(
    a: Tensor,  # (O, I, V), neighbouring columns
    b: Tensor,  # (O, I, V), neighbouring columns
    row_weight: Tensor | None,  # (O, I) fp32; rows of weight zero are skipped
    rows: Tensor,  # (O, I) fp32, written
    statistics: Tensor,  # (5, O, I) fp32, written
    divergence: str,
    inv_temperature: float,
) -> None:
    _launch_rows(a, b, row_weight, rows, statistics, None, divergence, "full", inv_temperature, 1.0)


def gradient(
    a: Tensor,  # (O, I, V), neighbouring columns
    b: Tensor,  # (O, I, V), neighbouring columns
    statistics: Tensor,  # (5, O, I) fp32
    grad_rows: Tensor,  # (O, I) fp32
    grad_a: Tensor,  # (O, I, V) or empty, written
    grad_b: Tensor,  # (O, I, V) or empty, written
    divergence: str,
    gradient: str,
    inv_temperature: float,
) -> None:
    count, columns = a.shape[0] * a.shape[1], a.shape[2]
    if count == 0 or (grad_a.numel() == 0 and grad_b.numel() == 0):
        return
    width = min(power_of_two(columns), GRADIENT_BLOCK)
    height = min(GRADIENT_BLOCK // width, 256)
    with on_device(a):
        _gradient[(triton.cdiv(count, height), triton.cdiv(columns, width))](
            a,
            b,
            statistics,
            grad_rows,
            grad_a,
            grad_b,
            count,
            columns,
            a.shape[1],
            *a.stride()[:2],
            *b.stride()[:2],
            *grad_rows.stride(),
            inv_temperature,
            DIVERGENCE=divergence,
            CONVENTION=gradient,
            WANTS_A=grad_a.numel() > 0,
            WANTS_B=grad_b.numel() > 0,
            ROWS=height,
            COLUMNS=width,
            num_warps=8,
            **OPTIONS,
        )


def loss_and_gradient(
    a: Tensor,  # (O, I, V), neighbouring columns
    b: Tensor,  # (O, I, V), neighbouring columns
    row_weight: Tensor | None,  # (O, I) fp32; rows of weight zero are skipped
    rows: Tensor,  # (O, I) fp32, written
    grad_a: Tensor,  # (O, I, V), written
    divergence: str,
    gradient: str,
    inv_temperature: float,
    grad_scale: float,
) -> None:
    _launch_rows(a, b, row_weight, rows, None, grad_a, divergence, gradient, inv_temperature, grad_scale)
