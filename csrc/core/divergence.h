// Divergences between two softmaxes, without cancellation: the formulas that every kernel calls.
//
// a, b are the adversarial and the clean logits over the temperature, p = softmax(a), q = softmax(b).
//
//   c = (a - b) at argmax b       d = (a - b) - c       Lambda = lse(a) - lse(b) - c
//   u = d - Lambda = log p - log q
//
//   J = KL(p||q) + KL(q||p) = sum_j (p_j - q_j) u_j     dJ/da = (p - q) + p (d - E_p[d])
//                                                       dJ/db = (q - p) - q (d - E_q[d])
//   KL(q||p) = sum_j q_j g(u_j), g(x) = expm1(x) - x    d/da = p - q      d/db = -q (d - E_q[d])
//
// (u - KL(p||q) = d - E_p[d] and u + KL(q||p) = d - E_q[d]: in terms of d nothing cancels on confident rows.)
//
// One sweep over a row, with c and the largest b known, gives all of it:
//
//   w2 = e^(b - max b), w1 = w2 e^d;  L1 = sum w1, L2 = sum w2, B = sum (w1 - w2)
//                                     P = sum w1 d, A = sum w2 d, C = sum (w1 - w2) d
//   Lambda = log1p(B / L2)       E_p[d] = P / L1       E_q[d] = A / L2       J = C / L1 - (A / L2) (B / L1)
//
// Where c lies three deviations out, J is the small difference of two numbers ten times its size: sums are closed in
// double, once a row. Where they are kCancelled times its size, J is summed term by term (TermSums in core/long_row.h).
//
// da + db is of second order in d where da and db are of first, so that it is not their sum:
//
//   J          (p - q) (d - E_p[d]) - q J = (p - q) (d - E_q[d]) - p J, whichever weight is the smaller
//   KL(q||p)   q (g(u) - KL(q||p))
//
// Both sums of weights are at least 1, since d = 0 at the largest b. The sweep is *narrow*, and right, while
// max a - c - max b <= 30; beyond, each side gets its own maximum (WideSums). Rows of up to 64 classes sum J term by
// term (core/exact_row.h); differences of logits are carried exactly (two-sum) where few classes share the rounding.
#pragma once

#include <cmath>

#include "core/arguments.h"
#include "core/elementary.h"

ALUM_BEGIN

constexpr int kExactColumns = 64;
constexpr float kNarrow = 30.0f;
constexpr float kSeries = 0.3f;
constexpr float kCancelled = 32.0f;

// Stands for the difference of a class that is -inf on both sides (NaN), whose weights are zero.
constexpr float kLowest = -3.40282347e38f;

// What the backward needs of a row, in the order in which it is stored, c before the temperature. NaN
// in lse_b marks a row without gradient.
template <class F>
struct RowStatistics {
  F lse_b, c, log_ratio, mean_p, mean_q;

  // The same for a vector of classes of one row.
  template <class V>
  ALUM_INLINE RowStatistics<V> broadcasted() const {
    return {broadcast<V>(lse_b), broadcast<V>(c), broadcast<V>(log_ratio), broadcast<V>(mean_p), broadcast<V>(mean_q)};
  }
};
constexpr int kRowStatistics = 5;

// They lie field by field, (5, N).
ALUM_INLINE void store_statistics(const DivergenceArguments& args, int64_t n, const RowStatistics<float>& stats) {
  float* to = args.statistics + n;
  to[0] = stats.lse_b;
  to[args.rows] = stats.c;
  to[2 * args.rows] = stats.log_ratio;
  to[3 * args.rows] = stats.mean_p;
  to[4 * args.rows] = stats.mean_q;
}

ALUM_INLINE RowStatistics<float> load_statistics(const DivergenceArguments& args, int64_t n) {
  const float* from = args.statistics + n;
  const int64_t rows = args.rows;
  return {from[0], from[rows], from[2 * rows], from[3 * rows], from[4 * rows]};
}

// high + low = a - b exactly (Knuth's two-sum: additions only, which no contraction into fused multiply-adds touches).
template <class F>
struct Exact {
  F high, low;
};

template <class F>
ALUM_INLINE Exact<F> exact_difference(F a, F b) {
  const F high = a - b, moved = high - a;
  return {high, (a - (high - moved)) - (b + moved)};
}

// One class as a kernel reads it. The difference a - b comes with it, since a fused linear divergence knows it better than
// two rounded logits do.
template <class F>
struct Logits {
  F a, b;
  Exact<F> difference;
};

template <class F>
ALUM_INLINE Logits<F> two_logits(F a, F b) {
  return {a, b, exact_difference(a, b)};
}

template <class F>
ALUM_INLINE Logits<F> logits_apart(F difference, F b) {
  return {b + difference, b, {difference, F{}}};
}

// What the two rows of a pair hold: both logits, or what comes out of a product with a head's weight, to which its bias
// is still to be added: both logits, or the difference a - b and b.
enum class RowForm { kLogits, kBiasedLogits, kBiasedDifferences };

// A class from what its rows hold; the bias is no part of the difference.
template <RowForm kForm, class F>
ALUM_INLINE Logits<F> class_of(F first, F b, F bias) {
  if constexpr (kForm == RowForm::kLogits) {
    return two_logits(first, b);
  } else if constexpr (kForm == RowForm::kBiasedDifferences) {
    return logits_apart(first, b + bias);
  } else {
    return {first + bias, b + bias, exact_difference(first, b)};
  }
}

// Neither side may hold NaN or +inf; a class that is -inf on one side only makes the divergence infinite.
template <class F>
ALUM_INLINE auto is_regular(F a, F b) {
  const F infinity = broadcast<F>(__builtin_inff());
  return (a < infinity) & (b < infinity);
}

template <class F>
ALUM_INLINE auto is_one_sided(F a, F b) {
  const F infinity = broadcast<F>(-__builtin_inff());
  return (a == infinity) ^ (b == infinity);
}

// Two weights with w1 = w2 e^d, and w1 - w2, each to a few roundings whatever the sign and size of d: one exponential
// gives both e^-|d| and expm1(-|d|).
template <class F>
struct Weights {
  F w1, w2, difference;
};

// From the larger of the two.
template <class F>
ALUM_INLINE Weights<F> weights_below(F larger, F d) {
  const auto up = d > 0.0f;
  // below -88.02 the scale is 2^-127, whose bits are those of zero
  const F least = broadcast<F>(-88.2f), fall = -absolute(d);
  const ExpSplit<F> e = exp_split(fall > least ? fall : least, F{});
  const F smaller = larger * (e.scale * e.minus_one + e.scale);
  const F loss = larger * (e.scale * e.minus_one + (e.scale - 1.0f));
  return {up ? larger : smaller, up ? smaller : larger, up ? -loss : loss};
}

// From log w2 = high + low. The larger logarithm is at most `most`; that of logits whose last place is itself a large
// number (1e9 and more) can come out anywhere above, and is held there.
template <class F>
ALUM_INLINE Weights<F> weights(F high, F low, F d, float most) {
  const F rest = low + (d > 0.0f ? d : F{}), room = most - rest;
  return weights_below(exp(high < room ? high : room, rest), d);
}

template <class F>
struct NarrowSums {
  F l1{}, l2{}, p{}, a{}, b{}, c{};

  ALUM_INLINE void add(F high, F low, F d) {
    const Weights<F> w = weights(high, low, d, kNarrow + 1.0f);
    l1 += w.w1;
    l2 += w.w2;
    p += w.w1 * d;
    a += w.w2 * d;
    b += w.difference;
    c += w.difference * d;
  }
};

template <class F>
ALUM_INLINE NarrowSums<F> plus(const NarrowSums<F>& x, const NarrowSums<F>& y) {
  return {x.l1 + y.l1, x.l2 + y.l2, x.p + y.p, x.a + y.a, x.b + y.b, x.c + y.c};
}

template <class F>
struct WideSums {
  F l1{}, l2{}, p{}, a{};

  ALUM_INLINE void add(F log_w1, F log_w2, F d) {
    const F w1 = exp(log_w1), w2 = exp(log_w2);
    l1 += w1;
    l2 += w2;
    p += w1 * d;
    a += w2 * d;
  }
};

template <class F>
ALUM_INLINE WideSums<F> plus(const WideSums<F>& x, const WideSums<F>& y) {
  return {x.l1 + y.l1, x.l2 + y.l2, x.p + y.p, x.a + y.a};
}

struct RowResult {
  RowStatistics<float> statistics;
  float symmetric_kl;
  bool cancelled;  // that value's digits have: it needs a sweep of its own
};

// J = own - common.
ALUM_INLINE RowResult close_row(double lse_b, double c, double log_ratio, double mean_p, double mean_q, double own,
                                double common) {
  const double symmetric_kl = own - common;
  return {{static_cast<float>(lse_b), static_cast<float>(c), static_cast<float>(log_ratio), static_cast<float>(mean_p),
           static_cast<float>(mean_q)},
          static_cast<float>(symmetric_kl),
          (common < 0.0 ? -common : common) > kCancelled * symmetric_kl};
}

ALUM_INLINE RowResult finish(const NarrowSums<double>& s, double max_b, double c) {
  const double change = s.b / s.l2, mean_q = s.a / s.l2;
  const double log_ratio = change > -0.5 ? ::log1p(change) : ::log(s.l1 / s.l2);
  return close_row(max_b + ::log(s.l2), c, log_ratio, s.p / s.l1, mean_q, s.c / s.l1, mean_q * (s.b / s.l1));
}

// The weights of these sums are e^(a - max a) and e^(b - max b); gap is max a - c - max b.
ALUM_INLINE RowResult finish(const WideSums<double>& s, double gap, double max_b, double c) {
  const double mean_p = s.p / s.l1, mean_q = s.a / s.l2;
  return close_row(max_b + ::log(s.l2), c, gap + ::log(s.l1 / s.l2), mean_p, mean_q, mean_p, mean_q);
}

// The term of one class in KL(q||p), from its weights w1 = p, w2 = q.
template <class F>
ALUM_INLINE F kl_q_term(const Weights<F>& w, F u) {
  return absolute(u) < kSeries ? w.w2 * g_series(u) : w.difference - w.w2 * u;
}

template <class F>
struct Gradients {
  F da, db;
};

// Which gradient a (divergence, convention) pair stands for; the side of a is what both kSymmetric and kKl say, whether
// or not b has one.
enum class Rule { kSymmetric, kDifference, kKl, kKlTarget };

ALUM_INLINE Rule rule_of(Divergence divergence, Convention convention) {
  if (divergence == Divergence::kKl) return convention == Convention::kFull ? Rule::kKl : Rule::kKlTarget;
  return convention == Convention::kDetachTargets ? Rule::kDifference : Rule::kSymmetric;
}

// Gradient of one class, before the upstream factor.
template <class F>
ALUM_INLINE Gradients<F> gradients(Rule rule, const Weights<F>& w, F d, F mean_p, F mean_q) {
  switch (rule) {
    case Rule::kDifference:
      return {w.difference, -w.difference};
    case Rule::kKl:
      return {w.difference, -w.w2 * (d - mean_q)};
    case Rule::kKlTarget:
      return {w.difference, F{}};
    default:
      return {w.difference + w.w1 * (d - mean_p), -w.difference - w.w2 * (d - mean_q)};
  }
}

// da + db of one class under a rule that has both, before the upstream factor; `loss` is the row's.
template <class F>
ALUM_INLINE F summed_gradient(Rule rule, const Weights<F>& w, F d, F u, F mean_p, F mean_q, F loss) {
  if (rule == Rule::kKl) return kl_q_term(w, u) - w.w2 * loss;
  const auto gained = u > 0.0f;
  return w.difference * (d - (gained ? mean_p : mean_q)) - (gained ? w.w2 : w.w1) * loss;
}

ALUM_END
