"""The Triton row kernels of ``linear_symmetric_kl``: what a product with a weight gave becomes what the next two take.

_tile_linear_rows      rows of up to 2,048 classes in registers (``exact_row.py``)
_stream_linear_rows    longer rows, in blocks: the sweeps of ``long_row.py``, then one that writes the gradients

b + bias, a = b + (a - b) are the logits, or a + bias and b + bias; their difference is never that of rounded sums
da + db is of second order where da and db are of first, and no sum of the two: ``summed_gradient``

reads   b and a - b, or both logits, (N, V) fp32; bias (V,) fp32; row_weight (N,) fp32
writes  loss (N,) fp32; weight * d/da and weight * (d/da + d/db), (N, V) fp32/bf16/fp16, where they are wanted. In fp32
        they may lie where the logits did: a row, or the block of a row in its last sweep, is read before it is written
"""

import triton
import triton.language as tl
from torch import Tensor

from alum_kernels.backends.triton.divergence import gradient_of, read_classes, settled, summed_gradient
from alum_kernels.backends.triton.elementary import narrowed
from alum_kernels.backends.triton.exact_row import TILE_COLUMNS, analyse_tile, tile_shape
from alum_kernels.backends.triton.launch import OPTIONS, on_device
from alum_kernels.backends.triton.long_row import STREAM_BLOCK, STREAM_WARPS, analyse_stream, stream_classes


@triton.jit
def _store_linear_gradients(
    grad_a_ptr,  # (N, V)
    grad_sum_ptr,  # (N, V)
    at,
    classes,
    statistics,
    loss,
    upstream,
    undefined,
    inside,
    DIVERGENCE: tl.constexpr,
    CONVENTION: tl.constexpr,
    WANTS_A: tl.constexpr,
    WANTS_SUM: tl.constexpr,
):
    dead = classes[5]
    if WANTS_A:
        da, _ = gradient_of(classes, statistics, DIVERGENCE, CONVENTION)
        da = settled(da, upstream, dead, undefined)
        tl.store(grad_a_ptr + at, narrowed(da, grad_a_ptr.dtype.element_ty), mask=inside)
    if WANTS_SUM:
        total = summed_gradient(classes, statistics, loss, DIVERGENCE)
        total = settled(total, upstream, dead, undefined)
        tl.store(grad_sum_ptr + at, narrowed(total, grad_sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_linear_rows(
    first_ptr,  # (N, V) fp32: a, or a - b with DIFFERENCES
    b_ptr,  # (N, V) fp32
    bias_ptr,  # (V,) fp32
    weight_ptr,  # (N,) fp32
    loss_ptr,  # (N,) fp32
    grad_a_ptr,  # (N, V), may be first_ptr
    grad_sum_ptr,  # (N, V), may be b_ptr
    rows,
    columns,
    first_stride,
    b_stride,
    weight_stride,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    CONVENTION: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_A: tl.constexpr,
    WANTS_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    exists = row < rows
    inside = exists & (column < columns)
    weight = tl.full((ROWS, 1), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row * weight_stride, mask=exists, other=0.0)
    wanted = inside & (weight != 0.0)
    first_at, b_at = first_ptr + row * first_stride + column, b_ptr + row * b_stride + column
    a, b, first, plain = read_classes(first_at, b_at, bias_ptr, column, wanted, DIFFERENCES, HAS_BIAS)
    loss, statistics, classes, undefined = analyse_tile(
        a, b, first, plain, column, inv_temperature, DIVERGENCE, DIFFERENCES
    )
    tl.store(loss_ptr + row, tl.where(weight != 0.0, loss, 0.0), mask=exists)
    if WANTS_A or WANTS_SUM:
        _store_linear_gradients(
            grad_a_ptr,
            grad_sum_ptr,
            row * columns + column,
            classes,
            statistics,
            loss,
            weight * inv_temperature,
            undefined,
            inside,
            DIVERGENCE,
            CONVENTION,
            WANTS_A,
            WANTS_SUM,
        )


@triton.jit
def _stream_linear_rows(
    first_ptr,  # (N, V) fp32: a, or a - b with DIFFERENCES
    b_ptr,  # (N, V) fp32
    bias_ptr,  # (V,) fp32
    weight_ptr,  # (N,) fp32
    loss_ptr,  # (N,) fp32
    grad_a_ptr,  # (N, V), may be first_ptr
    grad_sum_ptr,  # (N, V), may be b_ptr
    columns,
    first_stride,
    b_stride,
    weight_stride,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    CONVENTION: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_A: tl.constexpr,
    WANTS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.full((), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row * weight_stride)
    first, b = first_ptr + row * first_stride, b_ptr + row * b_stride
    length = tl.where(weight != 0.0, columns, 0)
    loss, statistics, undefined = analyse_stream(
        first, b, bias_ptr, length, inv_temperature, DIVERGENCE, DIFFERENCES, HAS_BIAS, BLOCK
    )
    tl.store(loss_ptr + row, tl.where(weight != 0.0, loss, 0.0))
    if WANTS_A or WANTS_SUM:
        for start in range(0, columns, BLOCK // 2):
            column, classes = stream_classes(
                first, b, bias_ptr, start, length, statistics, inv_temperature, DIFFERENCES, HAS_BIAS, BLOCK // 2
            )
            _store_linear_gradients(
                grad_a_ptr,
                grad_sum_ptr,
                row * columns + column,
                classes,
                statistics,
                loss,
                weight * inv_temperature,
                undefined,
                column < columns,
                DIVERGENCE,
                CONVENTION,
                WANTS_A,
                WANTS_SUM,
            )


def divergence_rows(
    first: Tensor,  # (1, N, V) fp32: the adversarial logits before the bias, or their difference from the clean ones
    b: Tensor,  # (1, N, V) fp32: the clean logits before the bias
    bias: Tensor | None,  # (V,) fp32
    row_weight: Tensor | None,  # (1, N) fp32; rows of weight zero are skipped
    rows: Tensor,  # (1, N) fp32, written
    grad_a: Tensor,  # (1, N, V) fp32, bf16, fp16 or empty, written: weight * d/da; may be `first`
    grad_sum: Tensor,  # the same of d/da + d/db, beside grad_a and for gradient="full" only; may be `b`
    differences: bool,
    divergence: str,
    gradient: str,
    inv_temperature: float,
) -> None:
    _, count, columns = first.shape
    wants_a, wants_sum = grad_a.numel() > 0, grad_sum.numel() > 0
    if wants_sum and gradient != "full":
        raise ValueError(f"grad_sum: expected none without the gradient of both sides, got gradient={gradient!r}")
    if count == 0:
        return
    strides = (first.stride(1), b.stride(1), 0 if row_weight is None else row_weight.stride(1))
    tensors = (first, b, bias, row_weight, rows, grad_a if wants_a else None, grad_sum if wants_sum else None)
    options = {
        "DIVERGENCE": divergence,
        "CONVENTION": gradient,
        "DIFFERENCES": differences,
        "HAS_BIAS": bias is not None,
        "HAS_WEIGHT": row_weight is not None,
        "WANTS_A": wants_a,
        "WANTS_SUM": wants_sum,
        **OPTIONS,
    }
    with on_device(first):
        if columns <= TILE_COLUMNS:
            height, width = tile_shape(columns)
            _tile_linear_rows[(triton.cdiv(count, height),)](
                *tensors, count, columns, *strides, inv_temperature, ROWS=height, COLUMNS=width, num_warps=4, **options
            )
        else:
            _stream_linear_rows[(count,)](
                *tensors, columns, *strides, inv_temperature, BLOCK=STREAM_BLOCK, num_warps=STREAM_WARPS, **options
            )
