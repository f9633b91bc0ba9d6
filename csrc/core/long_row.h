// Rows of more than 64 classes, spread over the lanes of a vector or the threads of a block: what each sweep adds up.
//
//   1  RowExtremes    max b with a - b there, max a, whether all is finite
//   2  NarrowSums     everything, while max a - c - max b <= 30; otherwise WideSums (core/divergence.h)
//   3  TermSums       only for few classes, KL(q||p) as a value, or where J cancels: term by term, with Lambda known
//   4  the gradient   class_gradient (core/exact_row.h)
#pragma once

#include "core/exact_row.h"

ALUM_BEGIN

// Up to here a row's terms are too few to average the rounding of J = C / L1 - ... out, and J is summed term by term.
constexpr int64_t kTermwiseColumns = 2048;

// Up to here differences of fp32 logits are carried exactly; beyond, their rounding averages out too. (Those of bf16
// and fp16 logits can need more than 24 bits as well, where the two are far apart.)
constexpr int64_t kExactRowColumns = 16384;

struct RowExtremes {
  float max_a, max_b;
  Exact<float> difference;  // a - b at the largest b
  bool regular, one_sided;

  // max a - c - max b over the temperature: beyond kNarrow the row is wide.
  ALUM_INLINE double gap(double inv_temperature) const {
    return (static_cast<double>(max_a) - max_b - difference.high - difference.low) * inv_temperature;
  }
};

// One class over the temperature: b - max b in two parts, and d = (a - b) - c; zero weight for dead classes.
template <class F>
struct Centred {
  F high, low, d;
};

template <bool kExact, class F>
ALUM_INLINE Centred<F> centred(const Logits<F>& y, const RowExtremes& x, float inv_temperature) {
  // NaN, the difference of a dead class, becomes a number
  const F least = broadcast<F>(kLowest);
  if constexpr (!kExact) {
    const float c = x.difference.high;
    return {(y.b - x.max_b) * inv_temperature, F{}, larger_of((y.difference.high - c) * inv_temperature, least)};
  } else {
    const Exact<F> d = y.difference, below = exact_difference(y.b, broadcast<F>(x.max_b));
    const F value = ((d.high - x.difference.high) + (d.low - x.difference.low)) * inv_temperature;
    const auto dead = y.b == broadcast<F>(-__builtin_inff());
    return {below.high * inv_temperature, dead ? F{} : below.low * inv_temperature, larger_of(value, least)};
  }
}

template <bool kExact, class F>
ALUM_INLINE void add_narrow(NarrowSums<F>& sums, const Logits<F>& logits, const RowExtremes& x, float inv_temperature) {
  const Centred<F> y = centred<kExact>(logits, x, inv_temperature);
  sums.add(y.high, y.low, y.d);
}

template <bool kExact, class F>
ALUM_INLINE void add_wide(WideSums<F>& sums, const Logits<F>& logits, const RowExtremes& x, float inv_temperature) {
  const Centred<F> y = centred<kExact>(logits, x, inv_temperature);
  sums.add((logits.a - x.max_a) * inv_temperature, y.high, y.d);
}

ALUM_INLINE RowResult finish_narrow(const NarrowSums<double>& s, const RowExtremes& x, float inv_temperature) {
  return finish(s, static_cast<double>(x.max_b) * inv_temperature, x.difference.high);
}

ALUM_INLINE RowResult finish_wide(const WideSums<double>& s, const RowExtremes& x, float inv_temperature) {
  return finish(s, x.gap(inv_temperature), static_cast<double>(x.max_b) * inv_temperature, x.difference.high);
}

// Classes that gained weight are summed on the scale of max a, the others on that of max b.
template <class F>
struct TermSums {
  F up{}, down{}, l1{}, l2{};

  ALUM_INLINE void add(const Logits<F>& logits, const RowExtremes& x, float inv_temperature, float log_ratio,
                       Divergence divergence) {
    const Centred<F> y = centred<true>(logits, x, inv_temperature);
    const Exact<F> above = exact_difference(logits.a, broadcast<F>(x.max_a));
    const auto dead = logits.b == broadcast<F>(-__builtin_inff());
    const F weight_a = exp(above.high * inv_temperature, dead ? F{} : above.low * inv_temperature);
    const F weight_b = exp(y.high, y.low), u = y.d - log_ratio;
    const auto gained = u > 0.0f;
    const Weights<F> w = weights_below(gained ? weight_a : weight_b, u);
    const F term = divergence == Divergence::kKl ? kl_q_term(w, u) : w.difference * u;
    up += gained ? term : F{};
    down += gained ? F{} : term;
    l1 += weight_a;
    l2 += weight_b;
  }
};

template <class F>
ALUM_INLINE TermSums<F> plus(const TermSums<F>& x, const TermSums<F>& y) {
  return {x.up + y.up, x.down + y.down, x.l1 + y.l1, x.l2 + y.l2};
}

ALUM_INLINE float finish_terms(const TermSums<double>& s) { return static_cast<float>(s.up / s.l1 + s.down / s.l2); }

ALUM_END
