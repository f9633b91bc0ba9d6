"""Divergences between two softmaxes in plain PyTorch, without cancellation.

a, b are the adversarial and the clean logits (already divided by the temperature), p = softmax(a), q = softmax(b).

    c = (a - b) at argmax b         d = (a - b) - c, formed exactly (two-sum)
    Lambda = log1p(sum_j q_j expm1(d_j)) while max a - c - max b <= 30, else lse(a) - lse(b) - c
    u = d - Lambda = log p - log q; else (a - max a) - (b - max b) - log(sum_j e^(a_j - max a) / sum_j e^(b_j - max b))
    p - q = q expm1(u) for u <= 0, -p expm1(-u) for u > 0           (never overflows)

    symmetric_kl  J = sum_j (p_j - q_j) u_j                         every term >= 0
        dJ/da = (p - q) + p (d - E_p[d])                            dJ/db = (q - p) - q (d - E_q[d])
    kl            KL(q||p) = sum_j q_j g(u_j)                       g(x) = expm1(x) - x >= 0
        d/da = p - q                                                d/db = -q (d - E_q[d])
    js            (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2, h(x) = x - log1p(x) >= 0
        KL(p||m) = sum_j p_j h((q_j - p_j) / 2 p_j)                 KL(q||m) likewise
        d/da = p (r - E_p[r]) / 2, r = log(p/m)                     d/db = q (r - E_q[r]) / 2, r = log(q/m)
    squared_hellinger  H2 = sum_j (sqrt p_j - sqrt q_j)^2 / 2 = 1 - sum_j sqrt(p_j q_j)
        H2 = sum_j max(p_j, q_j) expm1(-|u_j| / 2)^2 / 2            every term >= 0
        d/da = -p (x - E_p[x]) / 2, x = e^(-u/2)                    d/db = -q (x - E_q[x]) / 2, x = e^(u/2)

(u - KL(p||q) = d - E_p[d] and u + KL(q||p) = d - E_q[d]: in terms of d nothing cancels on confident rows.)

Five numbers a row carry the backward of the kernels: lse(b), c, Lambda, E_p[d] and E_q[d]. Everything here is
differentiable, twice; this file is the oracle of the kernels of the same name.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NARROW = 30.0
"""Largest max a - c - max b for which Lambda comes from expm1; beyond it the log-sum-exps may be subtracted."""

_SERIES = 0.3
_LN2 = math.log(2.0)


class RowStatistics(NamedTuple):
    """What the backward needs of each row, (N,) each."""

    lse_b: Tensor
    c: Tensor
    log_ratio: Tensor
    mean_p: Tensor
    mean_q: Tensor


class Terms(NamedTuple):
    """(N, V) quantities of a pair of rows; ``dead`` marks classes that are -inf on both sides.

    ``l1`` and ``l2``, (N,), are a row's sums of e^(a - max a) and of e^(b - max b).
    """

    p: Tensor
    q: Tensor
    d: Tensor
    u: Tensor
    difference: Tensor
    dead: Tensor
    l1: Tensor
    l2: Tensor


def _two_sum_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """high + low = a - b exactly (Knuth)."""
    high = a - b
    virtual = high - a
    return high, (a - (high - virtual)) - (b + virtual)


def _g(x: Tensor) -> Tensor:
    """expm1(x) - x for |x| < 0.3 by its Taylor series to x^14: below 1e-16 relative."""
    total = torch.full_like(x, 1 / math.factorial(14))
    for k in range(13, 1, -1):
        total = total * x + 1 / math.factorial(k)
    return total * x * x


def _h(x: Tensor) -> Tensor:
    """x - log1p(x) for -0.14 < x < 0.18, by log1p(x) = 2 atanh(s), s = x / (2 + x)."""
    s = x / (2 + x)
    square = s * s
    total = torch.full_like(x, 2 / 19)
    for k in range(17, 1, -2):
        total = total * square + 2 / k
    return 0.5 * x * x * (1 - s) - s * square * total


def _series_or(u: Tensor, series: Tensor, closed: Tensor) -> Tensor:
    return torch.where(u.abs() < _SERIES, series, closed)


def kl_terms(weight: Tensor, x: Tensor, change: Tensor) -> Tensor:
    """weight g(x), given change = weight expm1(x): the terms of KL(q||p) for (q, u), of KL(p||q) for (p, -u)."""
    return _series_or(x, weight * _g(x.clamp(-_SERIES, _SERIES)), change - weight * x)


def _exp_sum(high: Tensor, low: Tensor) -> Tensor:
    """e^(high + low), with the rounding error of the sum made good (4e-6 at 64 in fp32)."""
    total = high + low
    moved = total - high
    return torch.exp(total) * (1 + ((high - (total - moved)) + (low - moved)))


def _weight_of(logits: Tensor, rest: Tensor | int, largest: Tensor, dead: Tensor, inv_temperature: float) -> Tensor:
    """e^(logits + rest - largest) over the temperature, zero for dead classes."""
    high, low = _two_sum_difference(logits, largest)
    high, low = torch.where(dead, 0, high), torch.where(dead, 0, low + rest)
    return torch.where(dead, 0, _exp_sum(high * inv_temperature, low * inv_temperature))


def _fall(x: Tensor) -> Tensor:
    """-|x|, whose derivatives at zero are those of x."""
    return torch.where(x > 0, -x, x)


def weights_below(larger: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w1 = w2 e^d, w2 and w1 - w2 from the larger of the two, whatever the sign and size of d."""
    up, fall = d > 0, _fall(d)
    smaller, loss = larger * torch.exp(fall), larger * torch.expm1(fall)
    return torch.where(up, larger, smaller), torch.where(up, smaller, larger), torch.where(up, -loss, loss)


def analyse(
    a: Tensor, b: Tensor, inv_temperature: float, divergence: str, difference: Tensor | None = None
) -> tuple[RowStatistics, Terms, Tensor]:
    """Statistics, terms and the loss of each row of two (N, V) tensors; ``difference`` is a - b where it is known."""
    invalid = ~(a < math.inf).all(-1) | ~(b < math.inf).all(-1) | (b == -math.inf).all(-1)
    separated = ((a == -math.inf) != (b == -math.inf)).any(-1) & ~invalid
    dead = (a == -math.inf) & (b == -math.inf)
    spoilt = dead | invalid.unsqueeze(-1) | separated.unsqueeze(-1)
    lowest = torch.finfo(a.dtype).min
    a, b = torch.where(spoilt, lowest, a), torch.where(spoilt, lowest, b)

    # differences of logits, exactly; maxima and c are constants of the row, which the result does not depend on
    high, low = _two_sum_difference(a, b)
    a_low = torch.zeros_like(a)  # what b + difference lost when it was rounded to a
    if difference is not None:
        difference = torch.where(spoilt, 0, difference)
        a_low = torch.where(spoilt, 0, (difference - high) - low)
        high, low = difference, torch.zeros_like(a)
    top = b.argmax(-1, keepdim=True)
    c_high, c_low = high.gather(-1, top).detach(), low.gather(-1, top).detach()
    d = ((high - c_high) + (low - c_low)) * inv_temperature
    max_a, max_b = a.amax(-1, keepdim=True).detach(), b.amax(-1, keepdim=True).detach()
    c = (c_high + c_low).squeeze(-1)
    gap = ((max_a - a.gather(-1, top).detach()) - a_low.gather(-1, top).detach()).squeeze(-1) * inv_temperature
    weight_a = _weight_of(a, a_low, max_a, dead, inv_temperature)
    weight_b = _weight_of(b, 0, max_b, dead, inv_temperature)
    l1, l2 = weight_a.sum(-1), weight_b.sum(-1)

    lift = torch.exp(gap.clamp(max=NARROW)).unsqueeze(-1)
    change = weights_below(torch.where(d > 0, weight_a * lift, weight_b), d)[2].sum(-1) / l2
    near = (gap <= NARROW) & (change > -0.5)
    log_ratio = torch.where(near, torch.log1p(torch.where(near, change, 0)), gap + torch.log(l1 / l2))
    # far rows have d and Lambda in the hundreds where u is small: there u is taken from the largest logit of each side
    far_u = (((a - max_a) - (b - max_b)) + a_low) * inv_temperature - torch.log(l1 / l2).unsqueeze(-1)
    u = torch.where(dead, 0, torch.where(near.unsqueeze(-1), d - log_ratio.unsqueeze(-1), far_u))
    larger = torch.where(u > 0, weight_a / l1.unsqueeze(-1), weight_b / l2.unsqueeze(-1))
    p, q, difference = weights_below(torch.where(dead, 0, larger), u)

    terms = Terms(p, q, torch.where(dead, 0, d), u, difference, dead, l1, l2)
    if divergence == "symmetric_kl":
        loss = (difference * u).sum(-1)
    elif divergence == "kl":
        loss = kl_terms(q, u, difference).sum(-1)
    elif divergence == "js":
        loss = sum(_divergences_from_middle(terms)) / 2
    else:
        apart = torch.expm1(_fall(u) / 2)
        loss = (torch.where(u > 0, p, q) * apart * apart).sum(-1) / 2
    loss = torch.where(separated, math.inf, torch.where(invalid, math.nan, loss))
    lse_b = max_b.squeeze(-1) * inv_temperature + torch.log(l2)
    lse_b = torch.where(separated | invalid, math.nan, lse_b)
    return RowStatistics(lse_b, c, log_ratio, (p * terms.d).sum(-1), (q * terms.d).sum(-1)), terms, loss


def _divergences_from_middle(terms: Terms) -> tuple[Tensor, Tensor]:
    """KL(p||m) and KL(q||m) of each row, m = (p + q) / 2."""
    p, q, _, u, difference, *_ = terms
    of_p = _series_or(u, p * _h(torch.expm1(-u.clamp(min=-1)) / 2), -difference / 2 - p * _log_m_over(u))
    of_q = _series_or(u, q * _h(torch.expm1(u.clamp(max=1)) / 2), difference / 2 - q * _log_m_over(-u))
    return of_p.sum(-1), of_q.sum(-1)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); beyond 80, where torch's default is 20, it is x to the last digit of float64."""
    return torch.nn.functional.softplus(x, threshold=80)


def _log_m_over(u: Tensor) -> Tensor:
    """log(m / p) = log((1 + e^-u) / 2), given u = log p - log q."""
    near = torch.log1p(torch.expm1(-u.clamp(min=-1)) / 2)
    return torch.where(u > -1, near, _softplus(-u) - _LN2)


def _log_over_m(u: Tensor, weight: Tensor) -> Tensor:
    """log(p / m) less its value where the weight p of a row is largest, given u = log p - log q.

    Where that class all but left the other side, both logarithms are log 2 to many digits and their difference is
    taken without it; elsewhere they are near u / 2.
    """
    top = weight.argmax(-1, keepdim=True)
    at_top = u.gather(-1, top)
    log_m = torch.where(at_top > 1, _softplus(-u), _log_m_over(u))
    return log_m.gather(-1, top) - log_m


def _less_mean_root(weight: Tensor, middle: Tensor, u: Tensor) -> Tensor:
    """weight (x - E[x]), x = e^(-u/2), given u = log(weight / other) and middle = sqrt(weight other).

    x is taken less its value where the weight of a row is largest: there the difference is zero to the bit, and the
    mean is a sum over the other classes. Below that class in u the product is written with ``middle``, which is never
    larger than 1 where x would overflow.
    """
    at_top = u.gather(-1, weight.argmax(-1, keepdim=True))
    step = u - at_top
    change = torch.expm1(_fall(step) / 2)
    moved = torch.where(step > 0, weight * torch.exp(-at_top / 2) * change, -middle * change)
    return moved - weight * moved.sum(-1, keepdim=True)


def _centred(weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of a mean of x to the logits of its weights, weight (x - E[x])."""
    return weight * (x - (weight * x).sum(-1, keepdim=True))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss(
    a: Tensor,
    b: Tensor,
    row_weight: Tensor | None,
    *,
    divergence: str,
    inv_temperature: float,
    difference: Tensor | None = None,
) -> tuple[Tensor, RowStatistics]:
    """Loss of each row, (N,) fp32 (float64 for float64 logits), zero where ``row_weight`` is zero.

    ``difference``, a - b, may be given where it is known better than from two rounded logits.
    """
    statistics, _, rows = analyse(_widen(a), _widen(b), inv_temperature, divergence, difference)
    return rows if row_weight is None else torch.where(row_weight != 0, rows, 0), statistics


def gradient(
    a: Tensor, b: Tensor, grad_rows: Tensor, *, divergence: str, gradient: str, inv_temperature: float
) -> tuple[Tensor, Tensor | None]:
    """d loss / d a and d loss / d b, (N, V) each, times ``grad_rows`` (N,); rows of zero upstream are zero."""
    statistics, terms, _ = analyse(_widen(a), _widen(b), inv_temperature, divergence)
    p, q, d, u, difference, dead, *_ = terms
    if divergence == "js":
        da, db = _centred(p, _log_over_m(u, p)) / 2, _centred(q, _log_over_m(-u, q)) / 2
    elif divergence == "squared_hellinger":
        middle = torch.where(u > 0, p, q) * torch.exp(_fall(u) / 2)
        da, db = -_less_mean_root(p, middle, u) / 2, -_less_mean_root(q, middle, -u) / 2
    elif divergence == "kl":
        da = difference
        db = torch.zeros_like(q) if gradient == "detach_targets" else -q * (d - statistics.mean_q.unsqueeze(-1))
    elif gradient == "detach_targets":
        da, db = difference, -difference
    else:
        da = difference + p * (d - statistics.mean_p.unsqueeze(-1))
        db = -difference - q * (d - statistics.mean_q.unsqueeze(-1))
    side_a = settled(da, statistics, dead, grad_rows, inv_temperature).to(a.dtype)
    if gradient == "detach_clean":
        return side_a, None
    return side_a, settled(db, statistics, dead, grad_rows, inv_temperature).to(b.dtype)


def settled(side: Tensor, statistics: RowStatistics, dead: Tensor, grad_rows: Tensor, inv_temperature: float) -> Tensor:
    """A gradient (N, V) times ``grad_rows``: NaN in undefined rows, zero for dead classes and rows of zero upstream."""
    undefined, upstream = torch.isnan(statistics.lse_b).unsqueeze(-1), grad_rows.unsqueeze(-1)
    side = torch.where(undefined, math.nan, torch.where(dead, 0, side)) * (upstream * inv_temperature)
    return torch.where(upstream != 0, side, 0)


def linear_gradient(
    difference: Tensor, b: Tensor, grad_rows: Tensor, *, divergence: str, gradient: str, inv_temperature: float
) -> tuple[Tensor, Tensor]:
    """d loss / d difference and, at that difference, d loss / d b: what a linear head's products take, (N, V) each.

    The first is d/da; the second, d/da + d/db, is of second order in the difference and formed without cancellation.
    """
    statistics, terms, rows = analyse(b + difference, b, inv_temperature, divergence, difference)
    sides = linear_sides(terms, statistics, rows, divergence=divergence, gradient=gradient)
    return tuple(settled(side, statistics, terms.dead, grad_rows, inv_temperature) for side in sides)


def linear_sides(
    terms: Terms, statistics: RowStatistics, rows: Tensor, *, divergence: str, gradient: str
) -> tuple[Tensor, Tensor]:
    """The two gradients of :func:`linear_gradient` before upstream factor and edges, of terms and losses (N,)."""
    p, q, d, u, change, *_ = terms
    mean_p, mean_q, row = (x.unsqueeze(-1) for x in (statistics.mean_p, statistics.mean_q, rows))
    if divergence == "kl":
        da, total = change, kl_terms(q, u, change) - q * row
    elif gradient == "detach_targets":
        da, total = change, torch.zeros_like(change)
    else:
        da = change + p * (d - mean_p)
        total = torch.where(u > 0, change * (d - mean_p) - q * row, change * (d - mean_q) - p * row)
    if gradient == "detach_clean" or (divergence == "kl" and gradient == "detach_targets"):
        total = da
    return da, total
