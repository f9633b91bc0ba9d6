"""Divergences between two softmaxes in plain PyTorch, without cancellation.

a, b are the adversarial and the clean logits (already divided by the temperature), p = softmax(a), q = softmax(b).

    c = (a - b) at argmax b         d' = (a - b) - c, formed exactly for V <= 64
    Lambda = log1p(sum_j q_j expm1(d'_j)) while max d' <= 30, else lse(a) - lse(b) - c
    u = d' - Lambda = log p - log q
    p - q = q expm1(u) for u <= 0, -p expm1(-u) for u > 0           (never overflows)

    KL(p||q) = sum_j p_j g(-u_j)    KL(q||p) = sum_j q_j g(u_j)     g(x) = expm1(x) - x >= 0
    symmetric_kl  J = sum_j (p_j - q_j) u_j                         every term >= 0
        dJ/da = (p - q) + p (u - KL(p||q))                          dJ/db = (q - p) - q (u + KL(q||p))
    kl            KL(q||p)
        d/da = p - q                                                d/db = -q (u + KL(q||p))
    js            (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2, h(x) = x - log1p(x) >= 0
        KL(p||m) = sum_j p_j h((q_j - p_j) / 2 p_j)                 KL(q||m) likewise
        d/da = p (log(p/m) - KL(p||m)) / 2                          d/db = q (log(q/m) - KL(q||m)) / 2

Five numbers a row carry the backward: lse(b), c, Lambda and the two one-sided divergences (against q and p, or
against m for js). Everything here is differentiable, twice; this file is the oracle of the kernels of the same name.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXACT_COLUMNS = 64
"""Up to this many classes the difference of the logits is carried exactly (two-sum)."""

NARROW = 30.0
"""Largest d' for which Lambda comes from expm1; beyond it both log-sum-exps are far apart and may be subtracted."""

_SERIES = 0.3
_DEAD = -1e30
_LN2 = math.log(2.0)


class RowStatistics(NamedTuple):
    """What the backward needs of each row, (N,) each."""

    lse_b: Tensor
    c: Tensor
    log_ratio: Tensor
    divergence_p: Tensor
    divergence_q: Tensor


class _Terms(NamedTuple):
    """(N, V) quantities of a pair of rows; ``dead`` marks classes that are -inf on both sides."""

    p: Tensor
    q: Tensor
    u: Tensor
    difference: Tensor
    dead: Tensor


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


def _terms(a: Tensor, b: Tensor, d: Tensor, lse_b: Tensor, log_ratio: Tensor, dead: Tensor) -> _Terms:
    u = torch.where(dead, 0, d - log_ratio.unsqueeze(-1))
    larger = torch.where(dead, 0, torch.exp(b - lse_b.unsqueeze(-1) + torch.where(u > 0, u, 0)))
    shrink = torch.expm1(torch.where(u > 0, -u, u))
    smaller = larger * (1 + shrink)
    p = torch.where(u > 0, larger, smaller)
    q = torch.where(u > 0, smaller, larger)
    return _Terms(p, q, u, torch.where(u > 0, -larger * shrink, larger * shrink), dead)


def _centred_difference(a: Tensor, b: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """(c, d') of each row, in units of the temperature-scaled logits."""
    top = b.argmax(-1, keepdim=True)
    if a.shape[-1] <= EXACT_COLUMNS:
        high, low = _two_sum_difference(a, b)
        c_high, c_low = high.gather(-1, top).detach(), low.gather(-1, top).detach()
        centred = (high - c_high) + (low - c_low)
        return (c_high + c_low).squeeze(-1) * inv_temperature, centred * inv_temperature
    d = (a - b) * inv_temperature
    c = d.gather(-1, top).detach()
    return c.squeeze(-1), d - c


def _analyse(a: Tensor, b: Tensor, inv_temperature: float, divergence: str) -> tuple[RowStatistics, _Terms, Tensor]:
    """Statistics, terms and the loss of each row of two (N, V) tensors."""
    invalid = ~(a < math.inf).all(-1) | ~(b < math.inf).all(-1) | (b == -math.inf).all(-1)
    separated = ((a == -math.inf) != (b == -math.inf)).any(-1) & ~invalid
    dead = (a == -math.inf) & (b == -math.inf)
    spoilt = dead | invalid.unsqueeze(-1) | separated.unsqueeze(-1)
    a, b = torch.where(spoilt, _DEAD, a), torch.where(spoilt, _DEAD, b)

    c, d = _centred_difference(a, b, inv_temperature)
    a, b = a * inv_temperature, b * inv_temperature
    lse_a, lse_b = torch.logsumexp(a, -1), torch.logsumexp(b, -1)
    q = torch.exp(b - lse_b.unsqueeze(-1))
    narrow = torch.log1p((q * torch.expm1(d.clamp(max=NARROW))).sum(-1))
    log_ratio = torch.where(d.amax(-1) <= NARROW, narrow, lse_a - lse_b - c)
    terms = _terms(a, b, d, lse_b, log_ratio, dead)

    p, q, u, difference, _ = terms
    if divergence == "js":
        of_p = _series_or(u, p * _h(torch.expm1(-u.clamp(min=-1)) / 2), -difference / 2 - p * _log_m_over(u))
        of_q = _series_or(u, q * _h(torch.expm1(u.clamp(max=1)) / 2), difference / 2 - q * _log_m_over(-u))
    else:
        near = u.clamp(-_SERIES, _SERIES)
        of_p = _series_or(u, p * _g(-near), p * u - difference)
        of_q = _series_or(u, q * _g(near), difference - q * u)
    divergence_p, divergence_q = of_p.sum(-1), of_q.sum(-1)

    if divergence == "symmetric_kl":
        loss = (difference * u).sum(-1)
    elif divergence == "kl":
        loss = divergence_q
    else:
        loss = (divergence_p + divergence_q) / 2
    loss = torch.where(separated, math.inf, torch.where(invalid, math.nan, loss))
    lse_b = torch.where(separated | invalid, math.nan, lse_b)
    return RowStatistics(lse_b, c, log_ratio, divergence_p, divergence_q), terms, loss


def _log_m_over(u: Tensor) -> Tensor:
    """log(m / p) = log((1 + e^-u) / 2), given u = log p - log q."""
    near = torch.log1p(torch.expm1(-u.clamp(min=-1)) / 2)
    return torch.where(u > -1, near, torch.nn.functional.softplus(-u) - _LN2)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss(
    a: Tensor, b: Tensor, row_weight: Tensor | None, *, divergence: str, inv_temperature: float
) -> tuple[Tensor, RowStatistics]:
    """Loss of each row, (N,) fp32 (float64 for float64 logits), zero where ``row_weight`` is zero."""
    statistics, _, rows = _analyse(_widen(a), _widen(b), inv_temperature, divergence)
    return rows if row_weight is None else torch.where(row_weight != 0, rows, 0), statistics


def gradient(
    a: Tensor, b: Tensor, grad_rows: Tensor, *, divergence: str, gradient: str, inv_temperature: float
) -> tuple[Tensor, Tensor | None]:
    """d loss / d a and d loss / d b, (N, V) each, times ``grad_rows`` (N,); rows of zero upstream are zero."""
    statistics, terms, _ = _analyse(_widen(a), _widen(b), inv_temperature, divergence)
    p, q, u, difference, dead = terms
    upstream = grad_rows.unsqueeze(-1) * inv_temperature
    divergence_p, divergence_q = statistics.divergence_p.unsqueeze(-1), statistics.divergence_q.unsqueeze(-1)
    if divergence == "js":
        da = p * (-_log_m_over(u) - divergence_p) / 2
        db = q * (-_log_m_over(-u) - divergence_q) / 2
    elif divergence == "kl":
        da = difference
        db = torch.zeros_like(q) if gradient == "detach_targets" else -q * (u + divergence_q)
    elif gradient == "detach_targets":
        da, db = difference, -difference
    else:
        da = difference + p * (u - divergence_p)
        db = -difference - q * (u + divergence_q)
    undefined = torch.isnan(statistics.lse_b).unsqueeze(-1)

    def finish(side: Tensor, like: Tensor) -> Tensor:
        side = torch.where(undefined, math.nan, torch.where(dead, 0, side)) * upstream
        return torch.where(grad_rows.unsqueeze(-1) != 0, side, 0).to(like.dtype)

    return finish(da, a), None if gradient == "detach_clean" else finish(db, b)
