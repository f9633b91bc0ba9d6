"""The formulas of divergences between two softmaxes, for Triton kernels. Twin of ``csrc/core/divergence.h``."""

import triton
import triton.language as tl

from alum_kernels.backends.triton.elementary import exp_parts, exp_sum

INFINITY = tl.constexpr(float("inf"))
NARROW = tl.constexpr(30.0)
SERIES = tl.constexpr(0.3)
# e^x is zero here: the scale is 2^-127, whose bits are those of zero
VANISHED = tl.constexpr(-88.2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_WEIGHT = tl.constexpr(-1e30)


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def difference_of(a, b):
    """(high, low) with high + low = a - b exactly: additions only, which no fusing touches."""
    high = a - b
    moved = high - a
    return high, (a - (high - moved)) - (b + moved)


@triton.jit
def weights_below(larger, d):
    """(w1, w2, w1 - w2) with w1 = w2 e^d, from the larger of the two, whatever the sign and size of d."""
    up = d > 0.0
    fall = -tl.abs(d)
    scale, m = exp_parts(tl.where(fall > VANISHED, fall, VANISHED), d * 0.0)
    smaller = larger * (scale * m + scale)
    loss = larger * (scale * m + (scale - 1.0))
    return tl.where(up, larger, smaller), tl.where(up, smaller, larger), tl.where(up, -loss, loss)


@triton.jit
def weights(high, low, d):
    """The same from log w2 = high + low."""
    return weights_below(exp_sum(high, low + tl.where(d > 0.0, d, 0.0)), d)


@triton.jit
def gradient_of(w1, w2, difference, d, mean_p, mean_q, DIVERGENCE: tl.constexpr, CONVENTION: tl.constexpr):
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
def class_gradient(
    a, b, lse_b, c, log_ratio, mean_p, mean_q, inv_temperature, DIVERGENCE: tl.constexpr, CONVENTION: tl.constexpr
):
    """(da, db) of classes from the statistics of their rows; zero for classes that are -inf on both sides."""
    dead = b == -INFINITY
    d = tl.where(dead, 0.0, ((a - b) - c) * inv_temperature)
    w1, w2, difference = weights(tl.where(dead, NO_WEIGHT, b * inv_temperature), -lse_b, d - log_ratio)
    da, db = gradient_of(w1, w2, difference, d, mean_p, mean_q, DIVERGENCE, CONVENTION)
    return tl.where(dead, 0.0, da), tl.where(dead, 0.0, db)


@triton.jit
def settled(gradient, upstream, undefined):
    """The gradient as it is stored: zero without upstream, NaN for a row that has none."""
    return tl.where(upstream == 0.0, 0.0, tl.where(undefined, float("nan"), gradient * upstream))
