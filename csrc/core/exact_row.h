// Rows of up to 64 classes: the difference of the logits is carried exactly and every sum is taken term by term.
//
// F is one row (a GPU thread) or a vector of rows (a CPU register); `load(v)` gives class v of each. Three sweeps over
// values that stay on chip:
//
//   1  max b with c = (a - b) there, max a, and whether all is finite
//   2  Lambda = log1p(B / L2), or from both log-sum-exps where they are far apart
//   3  J = sum (p - q) u, or KL(q||p) = sum q g(u), every term >= 0;  E_p[d], E_q[d] for the gradient
#pragma once

#include "core/divergence.h"

ALUM_BEGIN

template <class F>
struct ExactRow {
  RowStatistics<F> statistics;
  F loss;
};

// kKept classes have room for what sweep 2 knows of them, so that sweep 3 need not find it again (0 on a GPU, whose
// registers cannot be indexed).
template <class F, int kKept, class Load>
ALUM_INLINE ExactRow<F> exact_row(Divergence divergence, const Load& load, int columns, float inv_temperature) {
  const F infinity = broadcast<F>(__builtin_inff());

  const Logits<F> first = load(0);
  F max_a = first.a, max_b = first.b;
  Exact<F> c = first.difference;
  auto regular = is_regular(first.a, first.b);
  auto one_sided = is_one_sided(first.a, first.b);
  for (int v = 1; v < columns; ++v) {
    const Logits<F> x = load(v);
    const Exact<F> d = x.difference;
    const auto above = x.b > max_b;
    c = {above ? d.high : c.high, above ? d.low : c.low};
    max_b = above ? x.b : max_b;
    max_a = larger_of(x.a, max_a);
    regular = regular & is_regular(x.a, x.b);
    one_sided = one_sided | is_one_sided(x.a, x.b);
  }
  regular = regular & (max_b > -infinity);

  // One class over the temperature: its weight on either side, each against its own maximum, and d. A dead class (-inf
  // on both sides) has weights and difference zero.
  struct Class {
    F weight_a, weight_b, d;
  };
  const auto weigh = [&](Logits<F> x) ALUM_LAMBDA {
    const Exact<F> d = x.difference;
    const Exact<F> below_a = exact_difference(x.a, max_a), below_b = exact_difference(x.b, max_b);
    const F centred = ((d.high - c.high) + (d.low - c.low)) * inv_temperature;
    const auto dead = x.b == -infinity;
    return Class{exp(below_a.high * inv_temperature, dead ? F{} : below_a.low * inv_temperature),
                 exp(below_b.high * inv_temperature, dead ? F{} : below_b.low * inv_temperature), dead ? F{} : centred};
  };

  // w1 = e^(a - c - max b) = weight_a e^gap
  const Exact<F> apart = exact_difference(max_a, max_b);
  const F gap = ((apart.high - c.high) + (apart.low - c.low)) * inv_temperature;
  const F lift = exp(gap < kNarrow ? gap : broadcast<F>(kNarrow));
  Class kept[kKept > 0 ? kKept : 1];
  F l1{}, l2{}, difference{};
  for (int v = 0; v < columns; ++v) {
    const Class x = weigh(load(v));
    if (kKept > 0) kept[v] = x;
    l1 += x.weight_a;
    l2 += x.weight_b;
    difference += weights_below(x.d > 0.0f ? x.weight_a * lift : x.weight_b, x.d).difference;
  }
  const F change = difference / l2;
  const auto near = (gap <= kNarrow) & (change > -0.5f);
  const F log_ratio = near ? log1p(near ? change : F{}) : gap + log(l1 / l2);

  const F inverse_l1 = 1.0f / l1, inverse_l2 = 1.0f / l2;
  F mean_p{}, mean_q{}, loss{};
  for (int v = 0; v < columns; ++v) {
    const Class x = kKept > 0 ? kept[v] : weigh(load(v));
    const F u = x.d - log_ratio;
    const Weights<F> w = weights_below(u > 0.0f ? x.weight_a * inverse_l1 : x.weight_b * inverse_l2, u);
    loss += divergence == Divergence::kKl ? kl_q_term(w, u) : w.difference * u;
    mean_p += w.w1 * x.d;
    mean_q += w.w2 * x.d;
  }

  const F not_a_number = broadcast<F>(__builtin_nanf(""));
  const F settled_loss = regular ? (one_sided ? infinity : loss) : not_a_number;
  const F lse_b = max_b * inv_temperature + log(l2);
  const F settled_lse = regular ? (one_sided ? not_a_number : lse_b) : not_a_number;
  return {{settled_lse, c.high, log_ratio, mean_p, mean_q}, settled_loss};
}

// What the gradient of one class is made of, from the stored statistics of a row that has one; weights and difference of
// a dead class are zero. At the largest b, d is zero as in the sums: c is that difference, rounded as here, and the
// temperature comes after it.
template <class F>
struct ClassTerms {
  F d, u;
  Weights<F> weights;
};

template <class F>
ALUM_INLINE ClassTerms<F> class_terms(const Logits<F>& x, const RowStatistics<F>& row, float inv_temperature) {
  // NaN is the difference of a dead class, whose weights are zero
  const F d = larger_of((x.difference.high - row.c) * inv_temperature, broadcast<F>(kLowest)), u = d - row.log_ratio;
  return {d, u, weights(x.b * inv_temperature, -row.lse_b, u, 0.0f)};
}

template <class F>
ALUM_INLINE Gradients<F> class_gradient(Rule rule, const Logits<F>& x, const RowStatistics<F>& row,
                                        float inv_temperature) {
  const ClassTerms<F> t = class_terms(x, row, inv_temperature);
  return gradients(rule, t.weights, t.d, row.mean_p, row.mean_q);
}

// The same for the side of a, with da + db.
template <class F>
struct LinearGradients {
  F da, sum;
};

template <class F>
ALUM_INLINE LinearGradients<F> linear_class_gradient(Rule rule, const Logits<F>& x, const RowStatistics<F>& row, F loss,
                                                     float inv_temperature) {
  const ClassTerms<F> t = class_terms(x, row, inv_temperature);
  return {gradients(rule, t.weights, t.d, row.mean_p, row.mean_q).da,
          summed_gradient(rule, t.weights, t.d, t.u, row.mean_p, row.mean_q, loss)};
}

ALUM_END
