// Elementary functions in fp32, as polynomials of our own: the same digits on every backend.
//
// Coefficients interpolate the exact function at Chebyshev nodes of the stated interval, rounded to fp32; the stated
// error is the largest relative one of the fp32 evaluation with fused multiply-adds, against 40 digits. The Triton
// twins in alum_kernels/backends/triton/elementary.py carry the same numbers; tests hold the two lists against each
// other.
#pragma once

#include "core/lane.h"

ALUM_BEGIN

// c[0] + c[1] x + ... by Horner's rule; unrolled, so that c stays in the instruction stream.
template <int N, class F>
ALUM_INLINE F polynomial(const float (&c)[N], F x) {
  F value = x * c[N - 1] + c[N - 2];
  ALUM_UNROLL
  for (int i = N - 3; i >= 0; --i) value = value * x + c[i];
  return value;
}

// e^(high + low) = scale (1 + minus_one), for -87.3 <= high + low <= 88.3; scale is a power of two. The two parts are
// reduced one after the other, so that neither the rounding of their sum (4e-6 at 64) enters, nor that of either.
template <class F>
struct ExpSplit {
  F scale, minus_one;
};

template <class F>
ALUM_INLINE ExpSplit<F> exp_split(F high, F low) {
  using U = typename Lane<F>::Uint;
  // expm1(r) = r + r^2 P(r), |r| <= 0.35: 7.4e-8
  constexpr float kExpm1[] = {0.5f, 0.166665733f, 0.0416665487f, 0.00836377405f, 0.00139269268f};
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // 1.5 * 2^23 + 127: adding it rounds to an integer, whose biased exponent is then in the low bits
  constexpr float kRound = 12583039.0f;
  const F shifted = (high + low) * kLog2e + kRound;
  const F n = shifted - kRound;
  const F r = ((high - n * kLn2High) + low) - n * kLn2Low;  // high and low may all but cancel
  const U exponent = bits_as<U>(shifted) << 23;
  return {bits_as<F>(exponent), r + r * r * polynomial(kExpm1, r)};
}

// Sums below -87.3 give 0; the caller keeps them under 88.
template <class F>
ALUM_INLINE F exp(F high, F low) {
  const ExpSplit<F> e = exp_split(high, low);
  const F value = e.scale * e.minus_one + e.scale;
  return high + low > -87.3f ? value : F{};
}

template <class F>
ALUM_INLINE F exp(F x) {
  return exp(x, F{});
}

// expm1(x) - x = x^2 G(x) for |x| <= 0.3: 1.6e-7.
template <class F>
ALUM_INLINE F g_series(F x) {
  constexpr float kG[] = {0.5f, 0.166666672f, 0.0416665524f, 0.00833332073f, 0.00139224087f, 0.00019878507f};
  return x * x * polynomial(kG, x);
}

// log1p(f) = f + f^2 R(f) for sqrt(1/2) <= 1 + f <= sqrt(2): 6.4e-8.
template <class F>
ALUM_INLINE F log1p_series(F f) {
  constexpr float kLog1p[] = {-0.49999997f, 0.333333284f, -0.250007987f, 0.200012878f,  -0.166260928f,
                              0.142030597f, -0.13131544f, 0.127387986f,  -0.0768349171f};
  return f + f * f * polynomial(kLog1p, f);
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)), for normal x > 0.
template <class F>
struct FloatSplit {
  F mantissa, exponent;
};

template <class F>
ALUM_INLINE FloatSplit<F> float_split(F x) {
  using I = typename Lane<F>::Int;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const I bits = bits_as<I>(x);
  const I k = (bits - kSqrtHalf) >> 23;
  // k lies in [-126, 128]: adding 1.5 * 2^23 in the bits makes it a float without a conversion instruction
  const F exponent = bits_as<F>(k + 0x4b400000) - 12582912.0f;
  return {bits_as<F>(bits - (k << 23)), exponent};
}

// For normal x > 0.
template <class F>
ALUM_INLINE F log(F x) {
  const FloatSplit<F> s = float_split(x);
  const F tail = log1p_series(s.mantissa - 1.0f) + s.exponent * -2.12194440e-4f;
  return s.exponent * 0.693359375f + tail;
}

// For finite x > -1; the rounding of 1 + x is made good to first order.
template <class F>
ALUM_INLINE F log1p(F x) {
  const F sum = 1.0f + x;
  const FloatSplit<F> s = float_split(sum);
  const F lost = x > 1.0f ? (1.0f - (sum - x)) / sum : (x - (sum - 1.0f)) / sum;
  const F tail = log1p_series(s.mantissa - 1.0f) + (s.exponent * -2.12194440e-4f + lost);
  const F value = s.exponent * 0.693359375f + tail;
  return s.exponent == F{} ? log1p_series(x) : value;
}

// cos(pi/2 f) = 1 + f^2 C(f^2) for |f| <= 1/2: 6.8e-8.
template <class F>
ALUM_INLINE F cos_quarter(F f) {
  constexpr float kCos[] = {-1.23370051f, 0.253669411f, -0.020861527f, 0.000906734902f};
  const F z = f * f;
  return z * polynomial(kCos, z) + 1.0f;
}

// sin(pi/2 f) = f S(f^2) for |f| <= 1/2: 1.2e-7.
template <class F>
ALUM_INLINE F sin_quarter(F f) {
  constexpr float kSin[] = {1.57079637f, -0.64596349f, 0.0796802044f, -0.00460211746f};
  const F z = f * f;
  return f * polynomial(kSin, z);
}

ALUM_END
