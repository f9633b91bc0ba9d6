"""Rows that are held in registers, term by term, in three sweeps. Counterpart of ``csrc/core/exact_row.h``."""

import triton
import triton.language as tl

from alum_kernels.backends.triton.divergence import (
    INFINITY,
    LOWEST,
    NARROW,
    REGULAR,
    apart,
    difference_of,
    kind_of,
    kl_q_term,
    loss_of,
    weights_below,
)
from alum_kernels.backends.triton.elementary import exp_sum, log, log1p
from alum_kernels.backends.triton.launch import power_of_two

TILE_COLUMNS = 2048
"""Up to here a row is held in registers."""


def tile_shape(columns: int) -> tuple[int, int]:
    """(rows, columns) of the tile of a program, powers of two."""
    width = power_of_two(columns)
    return min(max(TILE_COLUMNS // width, 1), 256), width


@triton.jit
def analyse_tile(a, b, first, plain, column, inv_temperature, DIVERGENCE: tl.constexpr, DIFFERENCES: tl.constexpr):
    """(loss, statistics, classes, undefined) of a tile of rows from ``read_classes``."""
    kind = tl.where(tl.max(b, 1) > -INFINITY, tl.max(kind_of(a, b), 1), 0)[:, None]
    undefined = kind != REGULAR
    dead = (b == -INFINITY) | undefined
    a, b = tl.where(dead, LOWEST, a), tl.where(dead, LOWEST, b)
    high, low = apart(tl.where(dead, 0.0, first), tl.where(dead, 0.0, plain), DIFFERENCES)

    # sweep 1: the largest b and the difference there
    max_a, max_b = tl.max(a, 1)[:, None], tl.max(b, 1)[:, None]
    top = column == tl.argmax(b, 1)[:, None]
    c_high = tl.sum(tl.where(top, high, 0.0), 1)[:, None]
    c_low = tl.sum(tl.where(top, low, 0.0), 1)[:, None]
    d = tl.where(dead, 0.0, ((high - c_high) + (low - c_low)) * inv_temperature)
    apart_high, apart_low = difference_of(max_a, max_b)
    gap = ((apart_high - c_high) + (apart_low - c_low)) * inv_temperature

    # sweep 2: both sums of weights, and Lambda
    below_high, below_low = difference_of(a, max_a)
    weight_a = tl.where(dead, 0.0, exp_sum(below_high * inv_temperature, below_low * inv_temperature))
    below_high, below_low = difference_of(b, max_b)
    weight_b = tl.where(dead, 0.0, exp_sum(below_high * inv_temperature, below_low * inv_temperature))
    l1, l2 = tl.sum(weight_a, 1)[:, None], tl.sum(weight_b, 1)[:, None]
    l1, l2 = tl.where(undefined, 1.0, l1), tl.where(undefined, 1.0, l2)
    lift = exp_sum(tl.minimum(gap, NARROW), gap * 0.0)
    _, _, difference = weights_below(tl.where(d > 0.0, weight_a * lift, weight_b), d)
    change = tl.div_rn(tl.sum(difference, 1)[:, None], l2)
    near = (gap <= NARROW) & (change > -0.5)
    log_ratio = tl.where(near, log1p(tl.where(near, change, 0.0)), gap + log(tl.div_rn(l1, l2)))

    # sweep 3: the divergence, term by term, and what the gradient needs
    u = d - log_ratio
    one = l1 * 0.0 + 1.0
    larger = tl.where(u > 0.0, weight_a * tl.div_rn(one, l1), weight_b * tl.div_rn(one, l2))
    w1, w2, difference = weights_below(larger, u)
    term = kl_q_term(w2, difference, u) if DIVERGENCE == "kl" else difference * u
    loss = tl.sum(tl.where(dead, 0.0, term), 1)[:, None]
    mean_p, mean_q = tl.sum(w1 * d, 1)[:, None], tl.sum(w2 * d, 1)[:, None]

    lse_b = max_b * inv_temperature + log(l2)
    statistics = (lse_b, c_high, log_ratio, mean_p, mean_q)
    return loss_of(kind, loss), statistics, (w1, w2, difference, d, u, dead), undefined
