"""The divergence of rows whose classes are split over ranks: what each rank knows of its slice, and how slices meet.

Slice r holds the shares P_r of p and Q_r of q; p^r = p / P_r and q^r = q / Q_r are its own softmaxes. By the chain rule
of relative entropy (Cover and Thomas, Elements of Information Theory, theorem 2.5.3)

    KL(p||q) = KL(P||Q) + sum_r P_r KL(p^r||q^r)      KL(q||p) = KL(Q||P) + sum_r Q_r KL(q^r||p^r)      J = their sum

where every term is >= 0. The slices are themselves the R classes of a row, with logits A_r = lse(a^r), B_r = lse(b^r)
whose difference c^r + Lambda^r is known without subtracting them. So the two-pass form of ``reference/symmetric_kl.py``
serves twice, on the classes of a slice and on the slices of a row. With c that of the slice of the largest B, and
U_r = log P_r - log Q_r:

    u_j = u^r_j + U_r        d_j = d^r_j + (c^r - c)        E_p[d] = sum_r P_r (E_p^r[d^r] + c^r - c), E_q[d] likewise
    p_j, q_j and p_j - q_j from the larger of P_r p^r_j and Q_r q^r_j, by u_j

and the gradients of a class are ``linear_sides`` of these, as in an unsplit row. A slice may be empty or hold -inf on
both sides only: its shares are zero.

The streamed rows of ``csrc/core/long_row.h`` and ``triton/long_row.py`` meet block by block in running sums, which have
to be brought to a common c and maximum first. Slices need neither, since each is analysed as a whole.

reads   b and a - b, or both logits, (N, V_r); bias (V_r,); row_weight (N,)
sends   eight fp64 numbers a row, whatever the logits' dtype: E_p[d] - E_q[d] of the slices cancels where J does not
writes  loss (N,); weight * dJ/da and weight * (dJ/da + dJ/db), (N, V_r), where they are wanted
holds   some twenty tensors as large as the chunk's logits (plain PyTorch on every device)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alum_kernels.backends.reference.symmetric_kl import (
    RowStatistics,
    Terms,
    analyse,
    kl_terms,
    linear_sides,
    settled,
    weights_below,
)

BYTES_PER_CLASS = 100
"""Of a row of fp32 logits, beside the logits themselves: what the analysis and the gradients hold at most."""

REGULAR, ONE_SIDED, UNDEFINED = 0, 1, 2
"""What a slice says of its row: -inf on one side of a class alone makes the loss infinite, NaN or +inf make it NaN."""


class Slice(NamedTuple):
    """What a rank tells of a row, (..., N) fp64 each."""

    kind: Tensor
    lse_b: Tensor  # over the temperature; -inf for a slice without weight
    c: Tensor  # a - b at the largest b, before the temperature
    log_ratio: Tensor  # lse(a) - lse(b) - c over the temperature
    mean_p: Tensor  # E[a - b - c] under the slice's own p and q
    mean_q: Tensor
    kl_p: Tensor  # KL(p||q) and KL(q||p) within the slice
    kl_q: Tensor


class Row(NamedTuple):
    """A whole row, (N,) each, and what places a slice in it, (R, N) each; fp64."""

    loss: Tensor
    statistics: RowStatistics
    share_p: Tensor
    share_q: Tensor
    log_shares: Tensor  # log P_r - log Q_r
    shift: Tensor  # c^r - c over the temperature


def slice_of(a: Tensor, b: Tensor, difference: Tensor, inv_temperature: float) -> tuple[Slice, Terms | None]:
    """What the columns of a slice, (N, V_r) with V_r >= 0, say of each row, and their terms for the gradients."""
    rows, columns = b.shape
    if columns == 0:
        nothing = torch.zeros(rows, dtype=torch.float64, device=b.device)
        return Slice(nothing, nothing - math.inf, *[nothing] * 6), None
    undefined = ~(a < math.inf).all(-1) | ~(b < math.inf).all(-1)
    one_sided = ((a == -math.inf) != (b == -math.inf)).any(-1) & ~undefined
    weightless = (b == -math.inf).all(-1)
    # the analysis would call these rows undefined, and a slice cannot: zeros stand for them, and the rest is said apart
    blank = (undefined | one_sided | weightless).unsqueeze(-1)
    a, b, difference = (torch.where(blank, 0, x) for x in (a, b, difference))
    own, terms, _ = analyse(a, b, inv_temperature, "symmetric_kl", difference)
    kl_p = kl_terms(terms.p, -terms.u, -terms.difference).sum(-1)
    kl_q = kl_terms(terms.q, terms.u, terms.difference).sum(-1)
    # in fp64: rounded to fp32, a log-sum-exp of 40 moves the shares by 4e-6
    lse_a, lse_b = (
        logits.amax(-1).double() * inv_temperature + total.double().log()
        for logits, total in ((a, terms.l1), (b, terms.l2))
    )
    lse_b = torch.where(weightless, -math.inf, lse_b)
    log_ratio = own.log_ratio.double()
    far = lse_a - lse_b - own.c.double() * inv_temperature
    log_ratio = torch.where((log_ratio.abs() > 1) & ~weightless, far, log_ratio)
    kind = UNDEFINED * undefined.double() + ONE_SIDED * one_sided.double()
    told = (own.c, log_ratio, own.mean_p, own.mean_q, kl_p, kl_q)
    return Slice(kind, lse_b, *(x.double() for x in told)), terms


def merged(slices: Slice, divergence: str, inv_temperature: float) -> Row:
    """The row that slices (R, N) of each field make, the same to the bit on every rank."""
    kind = slices.kind.amax(0)
    lse_b, step = slices.lse_b.T, (slices.c * inv_temperature + slices.log_ratio).T
    whole, terms, between = analyse(lse_b + step, lse_b, 1.0, divergence, step)
    share_p, share_q = terms.p.T, terms.q.T
    within = share_q * slices.kl_q
    if divergence == "symmetric_kl":
        within = within + share_p * slices.kl_p
    loss = between + within.sum(0)
    undefined = (kind == UNDEFINED) | (lse_b == -math.inf).all(-1)
    loss = torch.where(undefined, math.nan, torch.where(kind == ONE_SIDED, math.inf, loss))
    top = slices.lse_b.argmax(0, keepdim=True)
    c = slices.c.gather(0, top)
    shift = (slices.c - c) * inv_temperature
    mean_p, mean_q = (share_p * (slices.mean_p + shift)).sum(0), (share_q * (slices.mean_q + shift)).sum(0)
    lse_b = torch.where(undefined | (kind == ONE_SIDED), math.nan, whole.lse_b)
    # Lambda is counted from c as d is, not from the difference of the log-sum-exps
    log_ratio = whole.log_ratio + slices.log_ratio.gather(0, top).squeeze(0)
    statistics = RowStatistics(lse_b, c.squeeze(0), log_ratio, mean_p, mean_q)
    return Row(loss, statistics, share_p, share_q, terms.u.T, shift)


def gradients_of(
    terms: Terms, row: Row, rank: int, grad_rows: Tensor, *, divergence: str, gradient: str, inv_temperature: float
) -> tuple[Tensor, Tensor]:
    """d loss / da and d loss / da + d loss / db of a slice's classes, (N, V_r) each, times ``grad_rows`` (N,)."""

    def placed(x: Tensor) -> Tensor:
        return x[rank].to(terms.u.dtype).unsqueeze(-1)

    dead = terms.dead
    u = torch.where(dead, 0, terms.u + placed(row.log_shares))
    larger = torch.where(u > 0, terms.p * placed(row.share_p), terms.q * placed(row.share_q))
    p, q, difference = weights_below(larger, u)
    d = torch.where(dead, 0, terms.d + placed(row.shift))
    statistics = RowStatistics(*(x.to(u.dtype) for x in row.statistics))
    in_row = Terms(p, q, d, u, difference, dead, terms.l1, terms.l2)
    sides = linear_sides(in_row, statistics, row.loss.to(u.dtype), divergence=divergence, gradient=gradient)
    return tuple(settled(side, statistics, dead, grad_rows, inv_temperature) for side in sides)


class SplitRows:
    """The row kernel of ``linear_chunks.py`` on the slice of one rank, around one exchange a chunk.

    Args:
        gather: gives the (8, N) tensors of all ranks, (R, 8, N) in rank order, for that of this one.
        rank: which of them is this one's.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor], rank: int) -> None:
        self._gather, self._rank = gather, rank

    def divergence_rows(
        self,
        first: Tensor,  # (1, N, V_r): the adversarial logits before the bias, or their difference from the clean ones
        b: Tensor,  # (1, N, V_r): the clean logits before the bias
        bias: Tensor | None,  # (V_r,)
        row_weight: Tensor | None,  # (1, N); rows of weight zero are zero
        rows: Tensor,  # (1, N), written
        grad_a: Tensor,  # (1, N, V_r) or empty, written: weight * d/da; may be `first`
        grad_sum: Tensor,  # the same of d/da + d/db; may be `b`
        differences: bool,
        divergence: str,
        gradient: str,
        inv_temperature: float,
    ) -> None:
        first, clean = first[0], b[0]
        difference = first if differences else first - clean
        biased = clean if bias is None else clean + bias
        adv = biased + difference if differences else first if bias is None else first + bias
        told, terms = slice_of(adv, biased, difference, inv_temperature)
        everywhere = self._gather(torch.stack(told))
        row = merged(Slice(*everywhere.unbind(1)), divergence, inv_temperature)
        loss = row.loss.to(rows.dtype)
        rows[0] = loss if row_weight is None else torch.where(row_weight[0] != 0, loss, 0)
        if terms is None or grad_a.numel() == 0:
            return
        upstream = torch.ones_like(loss) if row_weight is None else row_weight[0].to(loss.dtype)
        options = {"divergence": divergence, "gradient": gradient, "inv_temperature": inv_temperature}
        side_a, both = gradients_of(terms, row, self._rank, upstream, **options)
        grad_a[0] = side_a
        if grad_sum.numel() > 0:
            grad_sum[0] = both
