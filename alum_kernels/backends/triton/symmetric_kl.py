"""The Triton kernels of ``symmetric_kl`` and ``kl``. Formulas: ``divergence.py`` beside this.

    _tile_rows      rows of up to 2,048 classes in registers: three sweeps over values that were read once
                    (``exact_row.py``)
    _stream_rows    longer rows, in blocks: one sweep that keeps running sums against the largest b seen so far, and a
                    second one where those lose digits or a side underflows against the other (``long_row.py``)
    _gradient       from the five floats of each row, element by element

Both loss kernels write the gradients in the same launch where they are wanted; the stream reads its row again for them.

    reads   a, b (O, I, V) fp32/bf16/fp16; row_weight (O, I) fp32; statistics (5, O, I), grad_rows (O, I) fp32
    writes  loss (O, I) fp32, statistics (5, O, I) fp32; da, db (O, I, V). Nothing else is as large as the logits.
"""

import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.divergence import (
    INFINITY,
    classes_of,
    gradient_of,
    read_classes,
    row_offset,
    settled,
)
from alum_kernels.backends.triton.elementary import narrowed
from alum_kernels.backends.triton.exact_row import TILE_COLUMNS, analyse_tile, tile_shape
from alum_kernels.backends.triton.launch import OPTIONS, on_device, power_of_two
from alum_kernels.backends.triton.long_row import STREAM_BLOCK, STREAM_WARPS, analyse_stream, stream_classes

GRADIENT_BLOCK = 4096
"""Elements of a program of the gradient kernel."""


@triton.jit
def _store_statistics(stats_ptr, rows, row, statistics, undefined, exists):
    lse_b, c, log_ratio, mean_p, mean_q = statistics
    tl.store(stats_ptr + row, tl.where(undefined, float("nan"), lse_b), mask=exists)
    tl.store(stats_ptr + rows + row, c, mask=exists)
    tl.store(stats_ptr + 2 * rows + row, log_ratio, mask=exists)
    tl.store(stats_ptr + 3 * rows + row, mean_p, mask=exists)
    tl.store(stats_ptr + 4 * rows + row, mean_q, mask=exists)


@triton.jit
def _store_gradients(
    grad_a_ptr,  # (N, V)
    grad_b_ptr,  # (N, V)
    at,
    classes,
    statistics,
    upstream,
    undefined,
    inside,
    DIVERGENCE: tl.constexpr,
    CONVENTION: tl.constexpr,
    WANTS_A: tl.constexpr,
    WANTS_B: tl.constexpr,
):
    da, db = gradient_of(classes, statistics, DIVERGENCE, CONVENTION)
    dead = classes[5]
    if WANTS_A:
        da = settled(da, upstream, dead, undefined)
        tl.store(grad_a_ptr + at, narrowed(da, grad_a_ptr.dtype.element_ty), mask=inside)
    if WANTS_B:
        db = settled(db, upstream, dead, undefined)
        tl.store(grad_b_ptr + at, narrowed(db, grad_b_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_rows(
    a_ptr,  # (O, I, V)
    b_ptr,  # (O, I, V)
    weight_ptr,  # (O, I) fp32
    loss_ptr,  # (N,) fp32
    stats_ptr,  # (5, N) fp32
    grad_a_ptr,  # (N, V)
    grad_b_ptr,  # (N, V)
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
    WANTS_A: tl.constexpr,
    WANTS_B: tl.constexpr,
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
    a_at = a_ptr + row_offset(row, inner, a_stride_outer, a_stride_inner) + column
    b_at = b_ptr + row_offset(row, inner, b_stride_outer, b_stride_inner) + column
    a, b, first, plain = read_classes(a_at, b_at, None, column, inside & (weight != 0.0), False, False)
    loss, statistics, classes, undefined = analyse_tile(a, b, first, plain, column, inv_temperature, DIVERGENCE, False)
    tl.store(loss_ptr + row, tl.where(weight != 0.0, loss, 0.0), mask=exists)
    if WANTS_STATS:
        _store_statistics(stats_ptr, rows, row, statistics, undefined, exists)
    if WANTS_A or WANTS_B:
        upstream = weight * grad_scale * inv_temperature
        _store_gradients(
            grad_a_ptr,
            grad_b_ptr,
            row * columns + column,
            classes,
            statistics,
            upstream,
            undefined,
            inside,
            DIVERGENCE,
            CONVENTION,
            WANTS_A,
            WANTS_B,
        )


@triton.jit
def _stream_rows(
    a_ptr,  # (O, I, V)
    b_ptr,  # (O, I, V)
    weight_ptr,  # (O, I) fp32
    loss_ptr,  # (N,) fp32
    stats_ptr,  # (5, N) fp32
    grad_a_ptr,  # (N, V)
    grad_b_ptr,  # (N, V)
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
    WANTS_A: tl.constexpr,
    WANTS_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.full((), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row_offset(row, inner, weight_stride_outer, weight_stride_inner))
    a_row = a_ptr + row_offset(row, inner, a_stride_outer, a_stride_inner)
    b_row = b_ptr + row_offset(row, inner, b_stride_outer, b_stride_inner)
    length = tl.where(weight != 0.0, columns, 0)
    loss, statistics, undefined = analyse_stream(
        a_row, b_row, None, length, inv_temperature, DIVERGENCE, False, False, BLOCK
    )
    tl.store(loss_ptr + row, tl.where(weight != 0.0, loss, 0.0))
    if WANTS_STATS:
        _store_statistics(stats_ptr, rows, row, statistics, undefined, row < rows)
    if WANTS_A or WANTS_B:
        upstream = weight * grad_scale * inv_temperature
        for start in range(0, columns, BLOCK // 2):
            column, classes = stream_classes(
                a_row, b_row, None, start, length, statistics, inv_temperature, False, False, BLOCK // 2
            )
            _store_gradients(
                grad_a_ptr,
                grad_b_ptr,
                row * columns + column,
                classes,
                statistics,
                upstream,
                undefined,
                column < columns,
                DIVERGENCE,
                CONVENTION,
                WANTS_A,
                WANTS_B,
            )


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
    a, b, _, _ = read_classes(a_at, b_at, None, column, wanted, False, False)
    undefined = lse_b != lse_b
    statistics = (tl.where(undefined, 0.0, lse_b), c, log_ratio, mean_p, mean_q)
    classes = classes_of(a - b, tl.where(undefined, -INFINITY, b), statistics, inv_temperature)
    _store_gradients(
        grad_a_ptr,
        grad_b_ptr,
        row * columns + column,
        classes,
        statistics,
        upstream,
        undefined,
        inside,
        DIVERGENCE,
        CONVENTION,
        WANTS_A,
        WANTS_B,
    )


def _launch_rows(
    a: Tensor,
    b: Tensor,
    row_weight: Tensor | None,
    rows: Tensor,
    statistics: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
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
        grad_b,
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
        "WANTS_A": grad_a is not None,
        "WANTS_B": grad_b is not None,
        **OPTIONS,
    }
    with on_device(a):
        if columns <= TILE_COLUMNS:
            height, width = tile_shape(columns)
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
    _launch_rows(a, b, row_weight, rows, statistics, None, None, divergence, "full", inv_temperature, 1.0)


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
    grad_b: Tensor,  # (O, I, V) or empty, written
    divergence: str,
    gradient: str,
    inv_temperature: float,
    grad_scale: float,
) -> None:
    both = grad_b if grad_b.numel() > 0 else None
    _launch_rows(a, b, row_weight, rows, None, grad_a, both, divergence, gradient, inv_temperature, grad_scale)
