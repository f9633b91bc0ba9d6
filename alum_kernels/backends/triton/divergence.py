"""The formulas of divergences between two softmaxes, for Triton kernels. Twin of ``csrc/core/divergence.h``.

Helpers of a kernel hand each other two tuples:

    classes      (w1, w2, w1 - w2, d, u, dead) of a tile or a block: both weights, d = (a - b) - c over the temperature,
                 u = log p - log q, and which classes are -inf on both sides
    statistics   (lse_b, c, Lambda, E_p[d], E_q[d]) of its rows: what a gradient needs beside the classes
"""

import triton
import triton.language as tl

from alum_kernels.backends.triton.elementary import exp_parts, exp_sum, g_series

INFINITY = tl.constexpr(float("inf"))
NARROW = tl.constexpr(30.0)
REGULAR = tl.constexpr(1)
SERIES = tl.constexpr(0.3)
CANCELLED = tl.constexpr(32.0)
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
def read_classes(
    first,  # pointers to a, or to a - b with DIFFERENCES
    plain,  # pointers to b
    bias,  # (V,) fp32, what both logits still lack, with HAS_BIAS
    column,
    inside,
    DIFFERENCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """(a, b, first, plain) in fp32: both logits, -inf outside, and what ``apart`` takes (a - b has no bias)."""
    first = tl.load(first, mask=inside, other=0.0 if DIFFERENCES else -INFINITY).to(tl.float32)
    plain = tl.load(plain, mask=inside, other=-INFINITY).to(tl.float32)
    a, b = first, plain
    if HAS_BIAS:
        added = tl.load(bias + column, mask=inside, other=0.0)
        a, b = a + added, b + added
    if DIFFERENCES:
        a = b + first
    return a, b, first, plain


@triton.jit
def apart(first, plain, DIFFERENCES: tl.constexpr):
    """(high, low) with high + low = a - b exactly."""
    if DIFFERENCES:
        high, low = first, tl.zeros_like(first)
    else:
        high, low = difference_of(first, plain)
    return high, low


@triton.jit
def kind_of(a, b):
    """What a class makes of its row, the largest deciding: 3 NaN or +inf, 2 -inf on one side, 1 REGULAR, 0 dead."""
    one_sided = (a == -INFINITY) != (b == -INFINITY)
    alive = tl.where(b == -INFINITY, 0, REGULAR)
    return tl.where((a < INFINITY) & (b < INFINITY), tl.where(one_sided, 2, alive), 3)


@triton.jit
def loss_of(kind, loss):
    """The loss of a row of this kind: NaN without a class that counts, +inf where only one side has one.

    (0 also stands for a row whose clean side has no class: there is no q.)
    """
    return tl.where(kind == REGULAR, loss, tl.where(kind == 2, INFINITY, float("nan")))


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
def weights(high, low, d, most):
    """The same from log w2 = high + low; the larger logarithm is at most ``most``, and held there for huge logits."""
    rest = low + tl.where(d > 0.0, d, 0.0)
    room = most - rest
    return weights_below(exp_sum(tl.where(high < room, high, room), rest), d)


@triton.jit
def kl_q_term(w2, difference, u):
    """The term of one class in KL(q||p), from its weights w2 = q and difference = p - q."""
    near = tl.abs(u) < SERIES
    return tl.where(near, w2 * g_series(tl.where(near, u, 0.0)), difference - w2 * u)


@triton.jit
def gradient_of(classes, statistics, DIVERGENCE: tl.constexpr, CONVENTION: tl.constexpr):
    """(da, db) before the upstream factor."""
    w1, w2, difference, d, _, _ = classes
    _, _, _, mean_p, mean_q = statistics
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
def summed_gradient(classes, statistics, loss, DIVERGENCE: tl.constexpr):
    """da + db where both sides have a gradient, before the upstream factor; ``loss`` is the row's."""
    w1, w2, difference, d, u, _ = classes
    _, _, _, mean_p, mean_q = statistics
    if DIVERGENCE == "kl":
        total = kl_q_term(w2, difference, u) - w2 * loss
    else:
        gained = u > 0.0
        total = difference * (d - tl.where(gained, mean_p, mean_q)) - tl.where(gained, w2, w1) * loss
    return total


@triton.jit
def classes_of(difference, b, statistics, inv_temperature):
    """(w1, w2, w1 - w2, d, u, dead) of classes from a - b, b and the statistics of their rows."""
    lse_b, c, log_ratio, _, _ = statistics
    dead = b == -INFINITY
    d = tl.where(dead, 0.0, (difference - c) * inv_temperature)
    u = d - log_ratio
    w1, w2, difference = weights(tl.where(dead, NO_WEIGHT, b * inv_temperature), -lse_b, u, 0.0)
    return w1, w2, difference, d, u, dead


@triton.jit
def settled(gradient, upstream, dead, undefined):
    """The gradient as it is stored: zero for dead classes and without upstream, NaN for a row that has none."""
    gradient = tl.where(undefined, float("nan"), tl.where(dead, 0.0, gradient) * upstream)
    return tl.where(upstream == 0.0, 0.0, gradient)
