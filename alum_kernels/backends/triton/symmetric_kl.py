"""The Triton kernels of ``symmetric_kl`` and ``kl``. Formulas: ``divergence.py`` beside this.

    _tile_rows     rows of up to 2,048 classes in registers: three sweeps over values that were read once
    stream_rows    longer rows, in blocks: one sweep that keeps running sums against the largest b seen so far
                   (and a second one where a side underflows against the other): ``long_row.py``
    _gradient      from the five floats of each row, element by element

Both loss kernels write the gradient of a in the same launch where it is wanted; the stream reads its row again for it.

    reads   a, b (O, I, V) fp32/bf16/fp16; row_weight (O, I) fp32; statistics (5, O, I), grad_rows (O, I) fp32
    writes  loss (O, I) fp32, statistics (5, O, I) fp32; da, db (O, I, V). Nothing else is as large as the logits.
"""

import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.divergence import (
    INFINITY,
    LOWEST,
    NARROW,
    SERIES,
    class_gradient,
    difference_of,
    gradient_of,
    row_offset,
    settled,
    weights_below,
)
from alum_kernels.backends.triton.elementary import exp_sum, g_series, log, log1p, narrowed
from alum_kernels.backends.triton.launch import OPTIONS, on_device, power_of_two
from alum_kernels.backends.triton.long_row import stream_rows

TILE_COLUMNS = 2048
"""Up to here a row is held in registers."""

STREAM_BLOCK, STREAM_WARPS = 8192, 16
"""Columns of a streamed block, and the warps that no architecture spills with."""

GRADIENT_BLOCK = 4096
"""Elements of a program of the gradient kernel."""


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
        offset = row_offset(row, inner, weight_stride_outer, weight_stride_inner)
        weight = tl.load(weight_ptr + offset, mask=exists, other=0.0)
    wanted = inside & (weight != 0.0)
    a_at = a_ptr + row_offset(row, inner, a_stride_outer, a_stride_inner) + column
    b_at = b_ptr + row_offset(row, inner, b_stride_outer, b_stride_inner) + column
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
    high, low = difference_of(a, b)
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
    l1, l2 = tl.where(none_alive, 1.0, l1), tl.where(none_alive, 1.0, l2)
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
        da, _ = gradient_of(w1, w2, difference, d, mean_p, mean_q, DIVERGENCE, CONVENTION)
        upstream = weight * grad_scale * inv_temperature
        da = settled(tl.where(dead, 0.0, da), upstream + da * 0.0, undefined)
        tl.store(grad_ptr + row * columns + column, narrowed(da, grad_ptr.dtype.element_ty), mask=inside)


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
    offset = row_offset(row, inner, upstream_stride_outer, upstream_stride_inner)
    upstream = tl.load(upstream_ptr + offset, mask=exists, other=0.0) * inv_temperature
    lse_b = tl.load(stats_ptr + row, mask=exists, other=0.0)
    c = tl.load(stats_ptr + rows + row, mask=exists, other=0.0)
    log_ratio = tl.load(stats_ptr + 2 * rows + row, mask=exists, other=0.0)
    mean_p = tl.load(stats_ptr + 3 * rows + row, mask=exists, other=0.0)
    mean_q = tl.load(stats_ptr + 4 * rows + row, mask=exists, other=0.0)
    wanted = inside & (upstream != 0.0)
    a_at = a_ptr + row_offset(row, inner, a_stride_outer, a_stride_inner) + column
    b_at = b_ptr + row_offset(row, inner, b_stride_outer, b_stride_inner) + column
    a = tl.load(a_at, mask=wanted, other=-INFINITY).to(tl.float32)
    b = tl.load(b_at, mask=wanted, other=-INFINITY).to(tl.float32)
    undefined = lse_b != lse_b
    usable = tl.where(undefined, 0.0, lse_b)
    da, db = class_gradient(
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
        da = settled(da, upstream + da * 0.0, undefined)
        tl.store(grad_a_ptr + at, narrowed(da, grad_a_ptr.dtype.element_ty), mask=inside)
    if WANTS_B:
        db = settled(db, upstream + db * 0.0, undefined)
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
            stream_rows[(count,)](*arguments, BLOCK=STREAM_BLOCK, num_warps=STREAM_WARPS, **options)


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
