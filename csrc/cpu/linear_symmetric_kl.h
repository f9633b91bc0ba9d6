// Rows of the linear divergence on the CPU, in place: what a product with a head's weight gave becomes what the next two
// products take. Formulas: core/divergence.h.
//
//   reads   b and a - b, or both logits, (N, V) fp32; bias (V,); row_weight (N,)
//   writes  loss (N,); d/da and d/da + d/db, (N, V) fp32, where they are wanted: they may lie where the logits did, since
//           the last sweep over a row reads each vector before it writes it
#pragma once

#include "cpu/symmetric_kl.h"

ALUM_BEGIN

template <Rule kRule, class Row>
void write_linear_gradient(const Row& row, const RowStatistics<float>& stats, float loss, float inv_temperature,
                           float upstream, float* grad_a, float* grad_sum) {
  const RowStatistics<Vec> all = stats.template broadcasted<Vec>();
  const Vec factor = broadcast<Vec>(upstream * inv_temperature), row_loss = broadcast<Vec>(loss);
  row.each_counted(0, row.columns, [&](int64_t v, auto count, const Logits<Vec>& y) ALUM_LAMBDA {
    const LinearGradients<Vec> g = linear_class_gradient(kRule, y, all, row_loss, inv_temperature);
    store_some(grad_a + v, g.da * factor, count);
    store_some(grad_sum + v, g.sum * factor, count);
  });
}

template <RowForm kForm>
void linear_divergence_rows(const DivergenceArguments& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    RowStatistics<float> stats{};
    const float weight = args.weight_of(n), upstream = weight * args.grad_scale;
    const auto row = row_pair<float, kForm>(args, n);
    const float loss = weight == 0.0f ? 0.0f : analyse_row(row, args, stats);
    args.loss[n] = loss;
    if (args.grad_a == nullptr) continue;
    float* const grad_a = static_cast<float*>(args.grad_a) + n * args.columns;
    float* const grad_sum = args.grad_sum == nullptr ? nullptr : static_cast<float*>(args.grad_sum) + n * args.columns;
    const bool settled = stats.lse_b == stats.lse_b && upstream != 0.0f;
    if (grad_sum == nullptr || !settled) {
      write_row_gradient(row, args, stats, upstream, grad_a, static_cast<float*>(nullptr));
      if (grad_sum != nullptr) fill_row(grad_sum, args.columns, upstream == 0.0f ? 0.0f : __builtin_nanf(""));
    } else if (rule_of(args.divergence, args.convention) == Rule::kKl) {
      write_linear_gradient<Rule::kKl>(row, stats, loss, args.inv_temperature, upstream, grad_a, grad_sum);
    } else {
      write_linear_gradient<Rule::kSymmetric>(row, stats, loss, args.inv_temperature, upstream, grad_a, grad_sum);
    }
  }
}

ALUM_END
