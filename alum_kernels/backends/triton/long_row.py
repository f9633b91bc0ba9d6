"""Rows that are read in blocks, in one sweep. Counterpart of ``csrc/core/long_row.h``.

The running sums of the stream, with w2 = e^(b - M), w1 = w2 e^d, d = (a - b) - c, M and c at the largest b so far:
L1 = sum w1, L2 = sum w2, B = sum (w1 - w2), P = sum w1 d, A = sum w2 d, C = sum (w1 - w2) d. When a block raises the
largest b, then with D = c_new - c, and after scaling all by e^(M - M_new), in this order:

    B' = e^-D B + expm1(-D) L2      C' = e^-D C + expm1(-D) A - D B'      A' = A - D L2      P' = e^-D (P - D L1)
    L1' = e^-D L1

Sums that cannot be brought there (D beyond 30, a weight above e^30), or whose digits cancel on the way (C' far below
e^-D C), are taken once more, with M and c known: the running ones need only be right where nothing was lost.
"""

import triton
import triton.language as tl

from alum_kernels.backends.triton.divergence import (
    CANCELLED,
    INFINITY,
    LOWEST,
    NARROW,
    NO_WEIGHT,
    REGULAR,
    VANISHED,
    apart,
    classes_of,
    kind_of,
    kl_q_term,
    loss_of,
    read_classes,
    weights,
)
from alum_kernels.backends.triton.elementary import exp_sum, expm1, log, log1p

STREAM_BLOCK, STREAM_WARPS = 8192, 16
"""Columns of a streamed block, and the warps that no architecture spills with."""


@triton.jit
def _block(
    first_row, b_row, bias, start, columns, DIFFERENCES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns [start, start + BLOCK) of a row: (column, a, b, a - b); beyond ``columns`` both logits are -inf."""
    column = start + tl.arange(0, BLOCK)
    a, b, first, plain = read_classes(
        first_row + column, b_row + column, bias, column, column < columns, DIFFERENCES, HAS_BIAS
    )
    high, _ = apart(first, plain, DIFFERENCES)
    return column, a, b, high


@triton.jit
def _narrow_sums(b, d, dead, max_b, inv_temperature):
    """What a block adds to (L1, L2, P, A, B, C), from b and d = (a - b) - c over the temperature."""
    # what is held at 1 + NARROW belongs to a row that is read again
    w1, w2, gain = weights(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), d * 0.0, d, NARROW + 1.0)
    return (
        tl.sum(w1, 0).to(tl.float64),
        tl.sum(w2, 0).to(tl.float64),
        tl.sum(w1 * d, 0).to(tl.float64),
        tl.sum(w2 * d, 0).to(tl.float64),
        tl.sum(gain, 0).to(tl.float64),
        tl.sum(gain * d, 0).to(tl.float64),
    )


@triton.jit
def analyse_stream(
    first_row,  # (V,) of a row: a, or a - b with DIFFERENCES
    b_row,  # (V,) of a row
    bias,  # (V,) fp32, with HAS_BIAS
    length,  # V, or 0 for a row that is skipped
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(loss, statistics, undefined) of a row."""
    max_a = tl.full((), -INFINITY, tl.float32)
    max_b = tl.full((), -INFINITY, tl.float32)
    c = tl.full((), 0.0, tl.float32)
    l1 = tl.full((), 0.0, tl.float64)
    l2 = tl.full((), 0.0, tl.float64)
    sum_a = tl.full((), 0.0, tl.float64)
    sum_b = tl.full((), 0.0, tl.float64)
    sum_c = tl.full((), 0.0, tl.float64)
    sum_p = tl.full((), 0.0, tl.float64)
    again = tl.full((), 0, tl.int32)  # whether the running sums are not those of the row
    kind = tl.full((), 0, tl.int32)
    for start in range(0, length, BLOCK):
        column, a, b, difference = _block(first_row, b_row, bias, start, length, DIFFERENCES, HAS_BIAS, BLOCK)
        kinds = kind_of(a, b)
        kind = tl.maximum(kind, tl.max(kinds, 0))
        dead = kinds != REGULAR
        a, b = tl.where(dead, LOWEST, a), tl.where(dead, LOWEST, b)
        difference = tl.where(dead, 0.0, difference)
        block_b = tl.max(b, 0)
        block_c = tl.sum(tl.where(column == start + tl.argmax(b, 0), difference, 0.0), 0)
        grows = block_b > max_b
        new_b, new_c = tl.where(grows, block_b, max_b), tl.where(grows, block_c, c)

        # bring the sums so far to the new largest b; those that vanish against it on both sides are dropped
        shift = (new_c - c) * inv_temperature
        fall = exp_sum((max_b - new_b) * inv_temperature, shift * 0.0)
        kept = (fall > 0.0) & (max_b > -INFINITY)
        largest_w1 = ((max_a - new_b) - new_c) * inv_temperature
        again = tl.where(kept, tl.where(tl.abs(shift) > NARROW, 1, again), (largest_w1 > VANISHED).to(tl.int32))
        shift = tl.where(kept & (tl.abs(shift) <= NARROW), shift, 0.0)
        fall = fall.to(tl.float64)
        lift, change = exp_sum(-shift, shift * 0.0).to(tl.float64), expm1(-shift).to(tl.float64)
        shift64 = shift.to(tl.float64)
        new_sum_b = fall * (lift * sum_b + change * l2)
        new_sum_c = fall * (lift * sum_c + change * sum_a) - shift64 * new_sum_b
        again = tl.where(kept & (fall * lift * sum_c > CANCELLED * new_sum_c), 1, again)
        # a dropped sum may be infinite
        sum_b, sum_c = tl.where(kept, new_sum_b, 0.0), tl.where(kept, new_sum_c, 0.0)
        sum_a = tl.where(kept, fall * (sum_a - shift64 * l2), 0.0)
        sum_p = tl.where(kept, fall * lift * (sum_p - shift64 * l1), 0.0)
        l1, l2 = tl.where(kept, fall * lift * l1, 0.0), tl.where(kept, fall * l2, 0.0)
        max_a, max_b, c = tl.maximum(max_a, tl.max(a, 0)), new_b, new_c

        again = tl.where(((max_a - max_b) - c) * inv_temperature > NARROW, 1, again)
        d = tl.where(dead, 0.0, (difference - c) * inv_temperature)
        more = _narrow_sums(b, d, dead, max_b, inv_temperature)
        l1, l2, sum_p, sum_a = l1 + more[0], l2 + more[1], sum_p + more[2], sum_a + more[3]
        sum_b, sum_c = sum_b + more[4], sum_c + more[5]

    if kind == 2:
        # looked at here, since another value through the loop above would spill
        clean = tl.full((), 0, tl.int32)  # whether b has a class
        for start in range(0, length, BLOCK):
            _, _, b, _ = _block(first_row, b_row, bias, start, length, DIFFERENCES, HAS_BIAS, BLOCK)
            clean = tl.maximum(clean, tl.max((b > -INFINITY).to(tl.int32), 0))
        kind = tl.where(clean != 0, kind, 0)
    undefined = kind != REGULAR
    gap = (max_a.to(tl.float64) - max_b.to(tl.float64) - c.to(tl.float64)) * inv_temperature
    wide = gap > NARROW
    if (wide | (again != 0)) & (undefined == 0):
        l1 = tl.full((), 0.0, tl.float64)
        l2 = tl.full((), 0.0, tl.float64)
        sum_a = tl.full((), 0.0, tl.float64)
        sum_b = tl.full((), 0.0, tl.float64)
        sum_c = tl.full((), 0.0, tl.float64)
        sum_p = tl.full((), 0.0, tl.float64)
        for start in range(0, length, BLOCK):
            column, a, b, difference = _block(first_row, b_row, bias, start, length, DIFFERENCES, HAS_BIAS, BLOCK)
            dead = b == -INFINITY
            d = tl.where(dead, 0.0, (difference - c) * inv_temperature)
            if wide:
                # one side underflows against the other: a maximum for each
                w1 = exp_sum(tl.where(dead, NO_WEIGHT, (a - max_a) * inv_temperature), d * 0.0)
                w2 = exp_sum(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), d * 0.0)
                l1 += tl.sum(w1, 0).to(tl.float64)
                l2 += tl.sum(w2, 0).to(tl.float64)
                sum_a += tl.sum(w2 * d, 0).to(tl.float64)
                sum_p += tl.sum(w1 * d, 0).to(tl.float64)
            else:
                more = _narrow_sums(b, d, dead, max_b, inv_temperature)
                l1, l2, sum_p, sum_a = l1 + more[0], l2 + more[1], sum_p + more[2], sum_a + more[3]
                sum_b, sum_c = sum_b + more[4], sum_c + more[5]

    l1, l2 = tl.where(undefined | (l1 <= 0.0), 1.0, l1), tl.where(undefined | (l2 <= 0.0), 1.0, l2)
    mean_p, mean_q = sum_p / l1, sum_a / l2
    change = tl.where(wide | undefined, 0.0, sum_b / l2).to(tl.float32)
    own = log((l1 / l2).to(tl.float32))
    near = log1p(tl.where(change > -0.5, change, 0.0))
    log_ratio = tl.where(wide, gap.to(tl.float32) + own, tl.where(change > -0.5, near, own))
    common = tl.where(wide, mean_q, mean_q * (sum_b / l1))
    loss = tl.where(wide, mean_p, sum_c / l1) - common
    by_terms = (undefined == 0) & (tl.abs(common) > CANCELLED * loss)
    if DIVERGENCE == "kl":
        by_terms = True
    loss = loss.to(tl.float32)
    lse_b = max_b * inv_temperature + log(l2.to(tl.float32))
    mean_p, mean_q = mean_p.to(tl.float32), mean_q.to(tl.float32)

    if by_terms:
        # KL(q||p) as a value, and J where it is a small difference of large numbers: terms >= 0, with Lambda known
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, length, BLOCK):
            column, a, b, difference = _block(first_row, b_row, bias, start, length, DIFFERENCES, HAS_BIAS, BLOCK)
            dead = (b == -INFINITY) | (undefined != 0)
            u = tl.where(dead, 0.0, (difference - c) * inv_temperature - log_ratio)
            w1, w2, gain = weights(tl.where(dead, NO_WEIGHT, (b - max_b) * inv_temperature), u * 0.0, u, NARROW + 1.0)
            term = kl_q_term(w2, gain, u) if DIVERGENCE == "kl" else gain * u
            total += tl.sum(term, 0).to(tl.float64)
        loss = (total / l2).to(tl.float32)

    return loss_of(kind, loss), (lse_b, c, log_ratio, mean_p, mean_q), undefined


@triton.jit
def stream_classes(
    first_row,  # (V,) of a row: a, or a - b with DIFFERENCES
    b_row,  # (V,) of a row
    bias,  # (V,) fp32, with HAS_BIAS
    start,
    length,
    statistics,
    inv_temperature,
    DIFFERENCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(column, classes) of a block of a row that has been analysed."""
    column, _, b, difference = _block(first_row, b_row, bias, start, length, DIFFERENCES, HAS_BIAS, BLOCK)
    return column, classes_of(difference, b, statistics, inv_temperature)
