// Divergences between softmaxes on the CPU.
//
//   loss                 reads a, b (N, V)                    writes loss (N,), statistics (5, N)
//   gradient             reads a, b, statistics, grad_rows    writes da, db (N, V)
//   loss and gradient    reads a, b, row_weight               writes loss (N,), da (N, V)
//
// Rows of more than 64 classes: one row at a time, columns in vectors, the row in cache between sweeps. Rows of up to
// 64 classes: a vector of rows at a time, turned through tiles on the stack. Formulas: core/divergence.h,
// core/exact_row.h.
#pragma once

#include <type_traits>

#include "core/arguments.h"
#include "cpu/simd.h"
#include "cpu/tile.h"
#include "core/long_row.h"

ALUM_BEGIN

template <class T, RowForm kForm>
struct RowPair {
  const T *first, *b;
  int64_t columns;
  const float* bias;  // (V,) or null

  ALUM_INLINE Logits<float> at(int64_t v) const {
    return class_of<kForm>(widen(first[v]), widen(b[v]), bias == nullptr ? 0.0f : bias[v]);
  }

  // body(v, count, logits) for every vector of columns; count < kWidth in the last one only, where lanes beyond it are
  // dead classes.
  template <class Body>
  ALUM_INLINE void each_counted(int64_t begin, int64_t end, const Body& body) const {
    const T *const from_first = first, *const from_b = b;
    int64_t v = begin;
    for (; v + kWidth <= end; v += kWidth) {
      const Vec added = kForm == RowForm::kLogits || bias == nullptr ? Vec{} : load(bias + v);
      body(v, std::integral_constant<int64_t, kWidth>{},
           class_of<kForm>(load(from_first + v), load(from_b + v), added));
    }
    if (v == end) return;
    const Vec dead = broadcast<Vec>(-__builtin_inff()), none = kForm == RowForm::kBiasedDifferences ? Vec{} : dead;
    const Vec added = kForm == RowForm::kLogits || bias == nullptr ? Vec{} : load_partial(bias + v, end - v, Vec{});
    body(v, end - v,
         class_of<kForm>(load_partial(from_first + v, end - v, none), load_partial(from_b + v, end - v, dead), added));
  }

  // body(logits) likewise.
  template <class Body>
  ALUM_INLINE void each(int64_t begin, int64_t end, const Body& body) const {
    each_counted(begin, end, [&](int64_t, auto, const Logits<Vec>& x) ALUM_LAMBDA { body(x); });
  }
};

// Whether a row holds NaN or +inf, and whether a class is -inf on one side only.
template <class Row>
void inspect_infinities(const Row& row, RowExtremes& x) {
  IntVec irregular{}, one_sided{};
  row.each(0, row.columns, [&](const Logits<Vec>& y) ALUM_LAMBDA {
    irregular |= ~is_regular(y.a, y.b);
    one_sided |= is_one_sided(y.a, y.b);
  });
  x.regular = !any_lane(irregular) && x.max_b > -__builtin_inff();
  x.one_sided = any_lane(one_sided);
}

template <class Row>
RowExtremes row_extremes(const Row& row) {
  const Vec none = broadcast<Vec>(-__builtin_inff());
  Vec max_a = none, max_b = none, finite{};
  Exact<Vec> at_max{};
  const auto look = [&](const Logits<Vec>& y) ALUM_LAMBDA {
    const auto above = y.b > max_b;
    at_max = {above ? y.difference.high : at_max.high, above ? y.difference.low : at_max.low};
    max_b = larger_of(y.b, max_b);
    max_a = larger_of(y.a, max_a);
  };
  const auto look_closely = [&](const Logits<Vec>& y) ALUM_LAMBDA {
    look(y);
    finite = y.a * 0.0f + (y.b * 0.0f + finite);  // stays zero while nothing is infinite or NaN
  };
  const int64_t whole = row.columns / kWidth * kWidth;
  row.each(0, whole, look_closely);
  row.each(whole, row.columns, look);  // padded with -inf
  bool all_finite = !any_lane(finite != Vec{});
  for (int64_t v = whole; v < row.columns; ++v) {
    const Logits<float> y = row.at(v);
    all_finite = all_finite && absolute(y.a) < __builtin_inff() && absolute(y.b) < __builtin_inff();
  }
  int best = 0;
  for (int i = 1; i < kWidth; ++i) best = max_b[i] > max_b[best] ? i : best;
  RowExtremes x{max_lanes(max_a), max_b[best], {at_max.high[best], at_max.low[best]}, true, false};
  if (!all_finite) inspect_infinities(row, x);
  return x;
}

ALUM_INLINE NarrowSums<double> total(const NarrowSums<double>& t, const NarrowSums<Vec>& s) {
  return {t.l1 + sum_lanes(s.l1), t.l2 + sum_lanes(s.l2), t.p + sum_lanes(s.p),
          t.a + sum_lanes(s.a),   t.b + sum_lanes(s.b),   t.c + sum_lanes(s.c)};
}

ALUM_INLINE WideSums<double> total(const WideSums<double>& t, const WideSums<Vec>& s) {
  return {t.l1 + sum_lanes(s.l1), t.l2 + sum_lanes(s.l2), t.p + sum_lanes(s.p), t.a + sum_lanes(s.a)};
}

ALUM_INLINE TermSums<double> total(const TermSums<double>& t, const TermSums<Vec>& s) {
  return {t.up + sum_lanes(s.up), t.down + sum_lanes(s.down), t.l1 + sum_lanes(s.l1), t.l2 + sum_lanes(s.l2)};
}

// Sums<double> of add(Sums<Vec>&, logits) over a row: fp32 within kFold vectors, double beyond. Among the kFold, few are
// added to any one number, since a term far larger than the others swallows the digits of what is added to it.
template <template <class> class Sums, class Row, class Add>
ALUM_INLINE Sums<double> sum_row(const Row& row, const Add& add) {
  constexpr int64_t kStep = 16 * kWidth, kBlock = static_cast<int64_t>(kFold) * kWidth;
  Sums<double> totals;
  for (int64_t begin = 0; begin < row.columns; begin += kBlock) {
    const int64_t end = begin + kBlock < row.columns ? begin + kBlock : row.columns;
    Sums<Vec> sums;
    for (int64_t from = begin; from < end; from += kStep) {
      Sums<Vec> few;
      row.each(from, from + kStep < end ? from + kStep : end, [&](const Logits<Vec>& y) ALUM_LAMBDA { add(few, y); });
      sums = plus(sums, few);
    }
    totals = total(totals, sums);
  }
  return totals;
}

template <bool kExact, class Row>
RowResult row_result(const Row& row, const RowExtremes& extremes, float inv_temperature) {
  const RowExtremes x = extremes;
  if (x.gap(inv_temperature) <= kNarrow) {
    const auto sums = sum_row<NarrowSums>(row, [&](NarrowSums<Vec>& s, const Logits<Vec>& y)
                                                   ALUM_LAMBDA { add_narrow<kExact>(s, y, x, inv_temperature); });
    return finish_narrow(sums, x, inv_temperature);
  }
  const auto sums = sum_row<WideSums>(
      row, [&](WideSums<Vec>& s, const Logits<Vec>& y) ALUM_LAMBDA { add_wide<kExact>(s, y, x, inv_temperature); });
  return finish_wide(sums, x, inv_temperature);
}

template <class Row>
float row_terms(const Row& row, const RowExtremes& extremes, const DivergenceArguments& args, float log_ratio) {
  const RowExtremes x = extremes;
  const Divergence divergence = args.divergence;
  const float inv_temperature = args.inv_temperature;
  return finish_terms(sum_row<TermSums>(row, [&](TermSums<Vec>& s, const Logits<Vec>& y)
                                                 ALUM_LAMBDA { s.add(y, x, inv_temperature, log_ratio, divergence); }));
}

template <class Row>
float analyse_row(const Row& row, const DivergenceArguments& args, RowStatistics<float>& stats) {
  const RowExtremes x = row_extremes(row);
  if (!x.regular || x.one_sided) {
    const float nan = __builtin_nanf("");
    stats = {nan, nan, nan, nan, nan};
    return x.regular ? __builtin_inff() : nan;
  }
  const bool exact = row.columns <= kExactRowColumns;
  const RowResult result =
      exact ? row_result<true>(row, x, args.inv_temperature) : row_result<false>(row, x, args.inv_temperature);
  stats = result.statistics;
  const bool few = row.columns <= kTermwiseColumns;
  const bool by_terms = few || result.cancelled || args.divergence == Divergence::kKl;
  return by_terms ? row_terms(row, x, args, stats.log_ratio) : result.symmetric_kl;
}

// Calls run(std::integral_constant<Rule, r>{}) for the rule that the arguments ask for.
template <class Run>
ALUM_INLINE void with_rule(const DivergenceArguments& args, const Run& run) {
  switch (rule_of(args.divergence, args.convention)) {
    case Rule::kSymmetric:
      return run(std::integral_constant<Rule, Rule::kSymmetric>{});
    case Rule::kDifference:
      return run(std::integral_constant<Rule, Rule::kDifference>{});
    case Rule::kKl:
      return run(std::integral_constant<Rule, Rule::kKl>{});
    case Rule::kKlTarget:
      return run(std::integral_constant<Rule, Rule::kKlTarget>{});
  }
}

template <class T>
void fill_row(T* to, int64_t columns, float value) {
  if (to == nullptr) return;
  for (int64_t v = 0; v < columns; v += kWidth) {
    store_some(to + v, broadcast<Vec>(value), columns - v < kWidth ? columns - v : kWidth);
  }
}

template <Rule kRule, bool kSideA, bool kSideB, class Row, class T>
void write_row_sides(const Row& row, const RowStatistics<float>& stats, float inv_temperature, float upstream,
                     T* grad_a, T* grad_b) {
  const RowStatistics<Vec> all = stats.template broadcasted<Vec>();
  const Vec factor = broadcast<Vec>(upstream * inv_temperature);
  row.each_counted(0, row.columns, [&](int64_t v, auto count, const Logits<Vec>& y) ALUM_LAMBDA {
    const Gradients<Vec> g = class_gradient(kRule, y, all, inv_temperature);
    if (kSideA) store_some(grad_a + v, g.da * factor, count);
    if (kSideB) store_some(grad_b + v, g.db * factor, count);
  });
}

template <class Row, class T>
void write_row_gradient(const Row& row, const DivergenceArguments& args, const RowStatistics<float>& stats,
                        float upstream, T* grad_a, T* grad_b) {
  const bool undefined = stats.lse_b != stats.lse_b, silent = upstream == 0.0f;
  if (undefined || silent) {
    fill_row(grad_a, row.columns, silent ? 0.0f : __builtin_nanf(""));
    fill_row(grad_b, row.columns, silent ? 0.0f : __builtin_nanf(""));
    return;
  }
  with_rule(args, [&](auto rule) {
    constexpr Rule kRule = decltype(rule)::value;
    if (grad_a != nullptr && grad_b != nullptr) {
      write_row_sides<kRule, true, true>(row, stats, args.inv_temperature, upstream, grad_a, grad_b);
    } else if (grad_a != nullptr) {
      write_row_sides<kRule, true, false>(row, stats, args.inv_temperature, upstream, grad_a, grad_b);
    } else if (grad_b != nullptr) {
      write_row_sides<kRule, false, true>(row, stats, args.inv_temperature, upstream, grad_a, grad_b);
    }
  });
}

using LogitTile = Tile<kExactColumns>;

template <class T>
void read_tile(LogitTile& tile, const LogitRows& rows, int64_t columns, int64_t first, int count) {
  const T* data = static_cast<const T*>(rows.data);
  const bool together = rows.strides.inner_step == columns && first + count <= rows.strides.inner;
  if (together) {
    tile.read(data + rows.strides.offset(first), count);
  } else {
    tile.read_rows<T>([&](int r) { return data + rows.strides.offset(first + r); }, count);
  }
}

// The tiles that a thread works through its rows with.
struct RowTiles {
  explicit RowTiles(const DivergenceArguments& args)
      : columns(static_cast<int>(args.columns)), a(columns), b(columns), grad_a(columns), grad_b(columns) {}

  const int columns;
  LogitTile a, b, grad_a, grad_b;

  Logits<Vec> operator()(int v) const { return two_logits(a[v], b[v]); }

  template <class T>
  void read(const DivergenceArguments& args, int64_t first, int count) {
    read_tile<T>(a, args.a, columns, first, count);
    read_tile<T>(b, args.b, columns, first, count);
  }
};

// A vector of rows is read and written as it is computed.
ALUM_INLINE void store_statistics(const DivergenceArguments& args, int64_t first, int count,
                                  const RowStatistics<Vec>& stats) {
  const Vec fields[] = {stats.lse_b, stats.c, stats.log_ratio, stats.mean_p, stats.mean_q};
  for (int i = 0; i < kRowStatistics; ++i) store_some(args.statistics + i * args.rows + first, fields[i], count);
}

ALUM_INLINE RowStatistics<Vec> load_statistics(const DivergenceArguments& args, int64_t first, int count) {
  Vec fields[kRowStatistics];
  for (int i = 0; i < kRowStatistics; ++i) fields[i] = load_some(args.statistics + i * args.rows + first, count);
  return {fields[0], fields[1], fields[2], fields[3], fields[4]};
}

template <class T>
void write_tile_gradient(RowTiles& tiles, const DivergenceArguments& args, const RowStatistics<Vec>& stats,
                         Vec upstream, int64_t first, int count, T* grad_a, T* grad_b) {
  const auto silent = upstream == Vec{}, undefined = stats.lse_b != stats.lse_b;
  const Vec factor = upstream * args.inv_temperature, nan = broadcast<Vec>(__builtin_nanf(""));
  const auto settle = [&](Vec g) ALUM_LAMBDA { return silent ? Vec{} : (undefined ? nan : g * factor); };
  with_rule(args, [&](auto rule) {
    constexpr Rule kRule = decltype(rule)::value;
    for (int v = 0; v < tiles.columns; ++v) {
      const auto g = class_gradient(kRule, tiles(v), stats, args.inv_temperature);
      tiles.grad_a.columns()[v] = settle(g.da);
      tiles.grad_b.columns()[v] = settle(g.db);
    }
  });
  if (grad_a != nullptr) tiles.grad_a.write(grad_a + first * args.columns, count);
  if (grad_b != nullptr) tiles.grad_b.write(grad_b + first * args.columns, count);
}

template <class T, RowForm kForm = RowForm::kLogits>
ALUM_INLINE RowPair<T, kForm> row_pair(const DivergenceArguments& args, int64_t n) {
  return {static_cast<const T*>(args.a.data) + args.a.strides.offset(n),
          static_cast<const T*>(args.b.data) + args.b.strides.offset(n), args.columns, args.bias};
}

template <class T>
void divergence_loss_rows(const DivergenceArguments& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    RowStatistics<float> stats{};
    args.loss[n] = args.weight_of(n) == 0.0f ? 0.0f : analyse_row(row_pair<T>(args, n), args, stats);
    store_statistics(args, n, stats);
  }
}

template <class T>
void divergence_gradient_rows(const DivergenceArguments& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    T* grad_a = args.grad_a == nullptr ? nullptr : static_cast<T*>(args.grad_a) + n * args.columns;
    T* grad_b = args.grad_b == nullptr ? nullptr : static_cast<T*>(args.grad_b) + n * args.columns;
    write_row_gradient(row_pair<T>(args, n), args, load_statistics(args, n), args.grad_rows.at(n), grad_a, grad_b);
  }
}

template <class T>
void divergence_loss_and_gradient_rows(const DivergenceArguments& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    RowStatistics<float> stats{};
    const float weight = args.weight_of(n);
    const auto row = row_pair<T>(args, n);
    args.loss[n] = weight == 0.0f ? 0.0f : analyse_row(row, args, stats);
    T* grad_b = args.grad_b == nullptr ? nullptr : static_cast<T*>(args.grad_b) + n * args.columns;
    write_row_gradient(row, args, stats, weight * args.grad_scale, static_cast<T*>(args.grad_a) + n * args.columns,
                       grad_b);
  }
}

// Loss and statistics of the vector of rows in the tiles; rows of weight zero lose nothing.
ALUM_INLINE ExactRow<Vec> analyse_tiles(const RowTiles& tiles, const DivergenceArguments& args, Vec weight) {
  ExactRow<Vec> row;
  if (args.divergence == Divergence::kKl) {
    row = exact_row<Vec, kExactColumns>(Divergence::kKl, tiles, tiles.columns, args.inv_temperature);
  } else {
    row = exact_row<Vec, kExactColumns>(Divergence::kSymmetricKl, tiles, tiles.columns, args.inv_temperature);
  }
  row.loss = weight == Vec{} ? Vec{} : row.loss;
  return row;
}

ALUM_INLINE Vec weights_of(const DivergenceArguments& args, int64_t first, int count) {
  Vec weight = Vec{} + 1.0f;
  if (args.row_weight.data == nullptr) return weight;
  for (int lane = 0; lane < count; ++lane) weight[lane] = args.row_weight.at(first + lane);
  return weight;
}

// body(first, count, weight) for every vector of rows, read into the tiles.
template <class T, class Body>
ALUM_INLINE void each_tile(RowTiles& tiles, const DivergenceArguments& args, int64_t begin, int64_t end,
                           const Body& body) {
  for (int64_t first = begin; first < end; first += kWidth) {
    const int count = static_cast<int>(end - first < kWidth ? end - first : kWidth);
    tiles.read<T>(args, first, count);
    body(first, count);
  }
}

template <class T>
void divergence_loss_tiles(const DivergenceArguments& args, int64_t begin, int64_t end) {
  RowTiles tiles(args);
  each_tile<T>(tiles, args, begin, end, [&](int64_t first, int count) {
    const ExactRow<Vec> row = analyse_tiles(tiles, args, weights_of(args, first, count));
    store_some(args.loss + first, row.loss, count);
    store_statistics(args, first, count, row.statistics);
  });
}

template <class T>
void divergence_gradient_tiles(const DivergenceArguments& args, int64_t begin, int64_t end) {
  RowTiles tiles(args);
  each_tile<T>(tiles, args, begin, end, [&](int64_t first, int count) {
    Vec upstream{};
    for (int lane = 0; lane < count; ++lane) upstream[lane] = args.grad_rows.at(first + lane);
    write_tile_gradient(tiles, args, load_statistics(args, first, count), upstream, first, count,
                        static_cast<T*>(args.grad_a), static_cast<T*>(args.grad_b));
  });
}

template <class T>
void divergence_loss_and_gradient_tiles(const DivergenceArguments& args, int64_t begin, int64_t end) {
  RowTiles tiles(args);
  each_tile<T>(tiles, args, begin, end, [&](int64_t first, int count) {
    const Vec weight = weights_of(args, first, count);
    const ExactRow<Vec> row = analyse_tiles(tiles, args, weight);
    store_some(args.loss + first, row.loss, count);
    write_tile_gradient<T>(tiles, args, row.statistics, weight * args.grad_scale, first, count,
                           static_cast<T*>(args.grad_a), static_cast<T*>(args.grad_b));
  });
}

ALUM_END
