"""Elementary functions in fp32 for Triton kernels: the twins of ``csrc/core/elementary.h``, with the same coefficients.

Triton has no expm1 and no log1p that run in the interpreter, and its compiled ``exp`` and ``log`` are approximate.
Errors below are the largest relative ones of the fp32 evaluation with fused multiply-adds, against 40 digits.
"""

import triton
import triton.language as tl

from alum_kernels.backends.triton import interpreted

# Compiled, a conversion to bf16 rounds to nearest even in one instruction; the interpreter truncates.
ROUNDS_BY_BITS = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.44269504)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
# 1.5 * 2^23 + 127: adding it rounds to an integer, whose biased exponent is then in the low bits
ROUND_TO_EXPONENT = tl.constexpr(12583039.0)
ROUND = tl.constexpr(12582912.0)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
LOWEST = tl.constexpr(-87.3)


@triton.jit
def _power_of_two(shifted):
    return (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _expm1_reduced(r):
    """expm1(r) = r + r^2 P(r), |r| <= 0.35: 7.4e-8."""
    p = 0.00139269268 * r + 0.00836377405
    p = p * r + 0.0416665487
    p = p * r + 0.166665733
    p = p * r + 0.5
    return r * r * p + r


@triton.jit
def exp_parts(high, low):
    """(scale, m) with e^(high + low) = scale (1 + m), for -87.3 <= high + low <= 88.3, which are reduced in turn."""
    shifted = (high + low) * LOG2E + ROUND_TO_EXPONENT
    n = shifted - ROUND_TO_EXPONENT
    r = ((high - n * LN2_HIGH) + low) - n * LN2_LOW  # high and low may all but cancel
    return _power_of_two(shifted), _expm1_reduced(r)


@triton.jit
def exp_sum(high, low):
    """e^(high + low); sums below -87.3 give 0, the caller keeps them under 88."""
    inside = high + low > LOWEST
    scale, m = exp_parts(tl.where(inside, high, 0.0), tl.where(inside, low, 0.0))
    return tl.where(inside, scale * m + scale, 0.0)


@triton.jit
def expm1(x):
    """expm1(x) for |x| <= 87."""
    scale, m = exp_parts(x, x * 0.0)
    return scale * m + (scale - 1.0)


@triton.jit
def g_series(x):
    """expm1(x) - x = x^2 G(x) for |x| <= 0.3: 1.6e-7."""
    p = 0.00019878507 * x + 0.00139224087
    p = p * x + 0.00833332073
    p = p * x + 0.0416665524
    p = p * x + 0.166666672
    p = p * x + 0.5
    return x * x * p


@triton.jit
def _log1p_reduced(f):
    """log1p(f) = f + f^2 R(f) for sqrt(1/2) <= 1 + f <= sqrt(2): 6.4e-8."""
    p = -0.0768349171 * f + 0.127387986
    p = p * f + -0.13131544
    p = p * f + 0.142030597
    p = p * f + -0.166260928
    p = p * f + 0.200012878
    p = p * f + -0.250007987
    p = p * f + 0.333333284
    p = p * f + -0.49999997
    return f * f * p + f


@triton.jit
def _split(x):
    """(m, k) with x = m 2^k and m in [sqrt(1/2), sqrt(2)), for normal x > 0."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF_BITS) >> 23
    return (bits - (k << 23)).to(tl.float32, bitcast=True), k.to(tl.float32)


@triton.jit
def log(x):
    """ln x for normal x > 0."""
    m, k = _split(x)
    return k * LN2_HIGH + (_log1p_reduced(m - 1.0) + k * LN2_LOW)


@triton.jit
def log1p(x):
    """log1p(x) for finite x > -1; the rounding of 1 + x is made good to first order."""
    total = 1.0 + x
    m, k = _split(total)
    lost = tl.where(x > 1.0, 1.0 - (total - x), x - (total - 1.0))
    value = k * LN2_HIGH + (_log1p_reduced(m - 1.0) + (k * LN2_LOW + tl.div_rn(lost, total)))
    return tl.where(k == 0.0, _log1p_reduced(tl.where(k == 0.0, x, 0.0)), value)


@triton.jit
def cos_quarter(f):
    """cos(pi/2 f) = 1 + f^2 C(f^2) for |f| <= 1/2: 6.8e-8."""
    z = f * f
    p = 0.000906734902 * z + -0.020861527
    p = p * z + 0.253669411
    p = p * z + -1.23370051
    return z * p + 1.0


@triton.jit
def sin_quarter(f):
    """sin(pi/2 f) = f S(f^2) for |f| <= 1/2: 1.2e-7."""
    z = f * f
    p = -0.00460211746 * z + 0.0796802044
    p = p * z + -0.64596349
    p = p * z + 1.57079637
    return f * p


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """fp32 values in a storage dtype, rounded to nearest even once."""
    if ROUNDS_BY_BITS:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + (((bits >> 16) & 1) + 0x7FFF), bits)
            result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            result = x.to(dtype)
    else:
        result = x.to(dtype)
    return result
