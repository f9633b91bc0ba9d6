// Rows that the threads of one or of several blocks share: what core/long_row.h sums up, and the gradients after it.
//
//   1  maxima, the difference at the largest b, whether all is finite     (reads the logits, stages them)
//   2  all sums                                                           (staged)
//   3  the divergence term by term, for few classes, KL or where J cancels (staged)
//   4  the gradients, one class at a time                                 (staged; writes)
#pragma once

#include "cuda/block_row.cuh"
#include "cuda/row_meeting.cuh"

namespace alum::cuda {

struct ThreadExtremes {
  float max_a, max_b, first_at_max_b, b_at_max_b;  // the two latter as they are stored
  unsigned flaws;                                  // bits: irregular, one-sided
};

// What the sums need to know.
struct RowShape {
  RowExtremes extremes;
  bool wide;
};

template <class Row>
__device__ __forceinline__ RowShape row_shape(const Row& row, float inv_temperature, RowMeeting& meeting) {
  constexpr float kNone = -__builtin_inff();
  ThreadExtremes x{kNone, kNone, kNone, kNone, 0};
  row.read([&](const Logits<float>& y, float first, float b) {
    if (y.b > x.max_b) {
      x.max_b = y.b;
      x.first_at_max_b = first;
      x.b_at_max_b = b;
    }
    x.max_a = larger_of(y.a, x.max_a);
    x.flaws |= (is_regular(y.a, y.b) ? 0u : 1u) | (is_one_sided(y.a, y.b) ? 2u : 0u);
  });
  const auto combine = [](const ThreadExtremes& p, const ThreadExtremes& q) {
    const bool second = q.max_b > p.max_b;
    return ThreadExtremes{larger_of(q.max_a, p.max_a), second ? q.max_b : p.max_b,
                          second ? q.first_at_max_b : p.first_at_max_b, second ? q.b_at_max_b : p.b_at_max_b,
                          p.flaws | q.flaws};
  };
  return meeting.reduce(x, combine, [&](const ThreadExtremes& all) {
    const RowExtremes extremes{all.max_a, all.max_b, Row::difference_of(all.first_at_max_b, all.b_at_max_b),
                               (all.flaws & 1u) == 0 && all.max_b > kNone, (all.flaws & 2u) != 0};
    return RowShape{extremes, !(extremes.gap(inv_temperature) <= kNarrow)};
  });
}

template <bool kExact, class Row>
__device__ __forceinline__ RowResult row_result(const Row& row, const RowShape& shape, float inv_temperature,
                                                RowMeeting& meeting) {
  const RowExtremes& x = shape.extremes;
  if (!shape.wide) {
    NarrowSums<float> sums;
    row.again([&](const Logits<float>& y) { add_narrow<kExact>(sums, y, x, inv_temperature); });
    return meeting.sum(sums, [&](const NarrowSums<double>& s) { return finish_narrow(s, x, inv_temperature); });
  }
  WideSums<float> sums;
  row.again([&](const Logits<float>& y) { add_wide<kExact>(sums, y, x, inv_temperature); });
  return meeting.sum(sums, [&](const WideSums<double>& s) { return finish_wide(s, x, inv_temperature); });
}

// Statistics and loss of a row.
template <bool kExact, class Row>
__device__ __forceinline__ float analyse_row(const Row& row, const DivergenceArguments& args,
                                             RowStatistics<float>& stats, RowMeeting& meeting) {
  const RowShape shape = row_shape(row, args.inv_temperature, meeting);
  const RowExtremes& x = shape.extremes;
  if (!x.regular || x.one_sided) {
    const float nan = __builtin_nanf("");
    stats = {nan, nan, nan, nan, nan};
    return x.regular ? __builtin_inff() : nan;
  }
  const RowResult result = row_result<kExact>(row, shape, args.inv_temperature, meeting);
  stats = result.statistics;
  const bool few = args.columns <= kTermwiseColumns;
  if (args.divergence == Divergence::kSymmetricKl && !few && !result.cancelled) return result.symmetric_kl;
  TermSums<float> sums;
  row.again([&](const Logits<float>& y) { sums.add(y, x, args.inv_temperature, stats.log_ratio, args.divergence); });
  return meeting.sum(sums, [](const TermSums<double>& s) { return finish_terms(s); });
}

// Loss and statistics of every row, and its gradients where there is room for them: write(row, n, stats, loss, factor)
// where it has some, fill(row, n, value) where all are zero or NaN.
template <bool kExact, class Row, class Write, class Fill>
__device__ __forceinline__ void each_long_row(const DivergenceArguments& args, const RowLayout& layout,
                                              const Write& write, const Fill& fill) {
  RowMeeting meeting(layout.blocks);
  const uint32_t stride = gridDim.x / layout.blocks;
  for (uint32_t n = blockIdx.x / layout.blocks; n < args.rows; n += stride) {
    const Row row(args, n, layout, meeting.rank());
    const float weight = args.weight_of(n);
    RowStatistics<float> stats{};
    float loss = 0.0f;
    if (weight != 0.0f) loss = analyse_row<kExact>(row, args, stats, meeting);
    if (threadIdx.x == 0 && meeting.rank() == 0) {
      args.loss[n] = loss;
      if (args.statistics != nullptr) store_statistics(args, n, stats);
    }
    if (args.grad_a == nullptr) continue;
    const float factor = weight * args.grad_scale * args.inv_temperature;
    const bool undefined = stats.lse_b != stats.lse_b;
    if (factor == 0.0f || undefined) {
      fill(row, n, factor == 0.0f ? 0.0f : __builtin_nanf(""));
    } else {
      write(row, n, stats, loss, factor);
    }
  }
}

struct GradientPair {
  float x, y;
};

// Where row n of a contiguous output begins; null for none.
template <class G>
__device__ __forceinline__ G* output_row(void* data, int64_t n, int64_t columns) {
  return data == nullptr ? nullptr : static_cast<G*>(data) + n * columns;
}

// ---- launching ----

// What 32 bits count, with a grid or a block added.
constexpr int64_t kMostRows = int64_t{1} << 31, kMostColumns = int64_t{1} << 30;

inline Machine this_machine() {
  return {
      10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), device_attribute(cudaDevAttrMultiProcessorCount)};
}

inline LaunchShape shape_of(const RowPlan& plan, int64_t rows) {
  LaunchShape shape{dim3(), dim3(static_cast<unsigned>(plan.threads))};
  if (plan.blocks_per_row == 1) {
    shape.grid = dim3(grid_for(rows, plan.rows_per_block));
  } else {
    const unsigned blocks = static_cast<unsigned>(plan.blocks_per_row);
    const int64_t most = 0x7fffffff / blocks;
    shape.grid = dim3(static_cast<unsigned>(rows < most ? rows : most) * blocks);
    shape.cluster = blocks;
  }
  shape.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  return shape;
}

// run(std::integral_constant<int, elements of an access>, std::bool_constant<differences carried exactly>, layout,
// shape) for rows of more than 64 classes, or of any number where they are a product's.
template <class T, class Run>
void with_long_rows(const DivergenceArguments& args, const void* second_output, size_t output_bytes, const Run& run) {
  if (args.rows > kMostRows || args.columns > kMostColumns) {
    throw std::runtime_error("alum_kernels: expected at most 2^31 rows of at most 2^30 classes");
  }
  const RowPlan plan = plan_long_rows(args.columns, sizeof(T), args.rows, this_machine());
  const auto with_pack = [&](auto pack) {
    constexpr int kPack = decltype(pack)::value;
    const RowLayout layout{static_cast<unsigned>(plan.blocks_per_row), static_cast<int>(plan.side_bytes / sizeof(T)),
                           outputs_in_step<kPack>(args, sizeof(T), args.grad_a, second_output, output_bytes)};
    const LaunchShape shape = shape_of(plan, args.rows);
    if (args.columns <= kExactRowColumns) {
      run(pack, std::true_type{}, layout, shape);
    } else {
      run(pack, std::false_type{}, layout, shape);
    }
  };
  constexpr int kWord = kWordBytes / sizeof(T);
  if (logits_in_step<kWord>(args, sizeof(T))) {
    with_pack(std::integral_constant<int, kWord>{});
  } else {
    with_pack(std::integral_constant<int, 1>{});
  }
}

}  // namespace alum::cuda
