// Divergences between softmaxes on CUDA. Formulas: core/divergence.h, core/exact_row.h, core/long_row.h.
//
//   loss                 reads a, b (N, V)                    writes loss (N,), statistics (5, N)
//   gradient             reads a, b, statistics, grad_rows    writes da, db (N, V)
//   loss and gradient    reads a, b, row_weight               writes loss (N,), da, db (N, V)
//
// Each is one launch that reads each logit once (where a row is longer than what row_plan.h can stage: once from memory,
// then from L2) and writes each output once. Loss alone and loss with gradient are one kernel, which writes gradients
// where it is given room for them; db is optional. Nothing else of size (N, V) is stored.
#include "cuda/launch.h"
#include "cuda/long_rows.cuh"
#include "cuda/short_rows.cuh"

namespace alum::cuda {
namespace {

constexpr int kElementThreads = 256;

// The bound is what lets a block of all its threads have registers enough: without it some architectures get 74 a thread.
template <class T, int kPack, bool kExact>
__global__ void __launch_bounds__(kMostRowThreads)
    long_rows_kernel(DivergenceArguments args, Rule rule, RowLayout layout) {
  using Row = BlockRow<T, kPack, RowForm::kLogits>;
  const auto write = [&](const Row& row, int64_t n, const RowStatistics<float>& stats, float, float factor) {
    row.write(output_row<T>(args.grad_a, n, args.columns), output_row<T>(args.grad_b, n, args.columns),
              [&](const Logits<float>& y) {
                const Gradients<float> g = class_gradient(rule, y, stats, args.inv_temperature);
                return GradientPair{g.da * factor, g.db * factor};
              });
  };
  const auto fill = [&](const Row& row, int64_t n, float value) {
    row.fill(output_row<T>(args.grad_a, n, args.columns), output_row<T>(args.grad_b, n, args.columns), value);
  };
  each_long_row<kExact, Row>(args, layout, write, fill);
}

// ---- the gradient from stored statistics ----

template <class T>
__global__ void __launch_bounds__(kElementThreads) short_gradient_kernel(DivergenceArguments args, Rule rule) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kElementThreads, all = args.rows * args.columns;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x; i < all; i += stride) {
    const int64_t n = i / args.columns, v = i % args.columns;
    const float upstream = args.grad_rows.at(n) * args.inv_temperature;
    const RowStatistics<float> stats = load_statistics(args, n);
    const bool undefined = stats.lse_b != stats.lse_b;
    Gradients<float> g{0.0f, 0.0f};
    if (upstream != 0.0f && !undefined) {
      const float a = widen(static_cast<const T*>(args.a.data)[args.a.strides.offset(n) + v]);
      const float b = widen(static_cast<const T*>(args.b.data)[args.b.strides.offset(n) + v]);
      g = class_gradient(rule, two_logits(a, b), stats, args.inv_temperature);
    }
    if (args.grad_a != nullptr) static_cast<T*>(args.grad_a)[i] = narrow<T>(settled(g.da, upstream, undefined));
    if (args.grad_b != nullptr) static_cast<T*>(args.grad_b)[i] = narrow<T>(settled(g.db, upstream, undefined));
  }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kElementThreads)
    long_gradient_kernel(DivergenceArguments args, Rule rule, bool outputs_in_step) {
  const int columns = static_cast<int>(args.columns);
  for (int64_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    const float upstream = args.grad_rows.at(n) * args.inv_temperature;
    const RowStatistics<float> stats = load_statistics(args, n);
    const bool undefined = stats.lse_b != stats.lse_b, silent = upstream == 0.0f;
    const T* from_a = static_cast<const T*>(args.a.data) + args.a.strides.offset(n);
    const T* from_b = static_cast<const T*>(args.b.data) + args.b.strides.offset(n);
    T* const to_a = args.grad_a == nullptr ? nullptr : static_cast<T*>(args.grad_a) + n * args.columns;
    T* const to_b = args.grad_b == nullptr ? nullptr : static_cast<T*>(args.grad_b) + n * args.columns;
    const int shift = shift_of<kPack>(from_a), packs = (shift + columns + kPack - 1) / kPack;
    const int step = static_cast<int>(gridDim.y) * kElementThreads;
    for (int i = static_cast<int>(blockIdx.y) * kElementThreads + static_cast<int>(threadIdx.x); i < packs; i += step) {
      const int v = i * kPack - shift;
      Pack<T, kPack> da, db;
      if (undefined || silent) {
        for (int j = 0; j < kPack; ++j) da.values[j] = db.values[j] = narrow<T>(settled(0.0f, upstream, undefined));
      } else {
        const Pack<T, kPack> a = load_pack<kPack>(from_a, v, columns, 0.0f);
        const Pack<T, kPack> b = load_pack<kPack>(from_b, v, columns, 0.0f);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const Logits<float> x = two_logits(widen(a.values[j]), widen(b.values[j]));
          const Gradients<float> g = class_gradient(rule, x, stats, args.inv_temperature);
          da.values[j] = narrow<T>(g.da * upstream);
          db.values[j] = narrow<T>(g.db * upstream);
        }
      }
      if (to_a != nullptr) store_pack<kPack>(to_a, v, columns, outputs_in_step, da);
      if (to_b != nullptr) store_pack<kPack>(to_b, v, columns, outputs_in_step, db);
    }
  }
}

// ---- choosing a kernel ----

template <class T>
void launch_rows(const DivergenceArguments& args, Rule rule, void* stream) {
  if (args.columns <= kExactColumns) {
    const RowPlan plan = plan_short_rows(args.columns, sizeof(T), this_machine());
    return launch(short_rows_kernel<T>, shape_of(plan, args.rows), stream, args, rule);
  }
  with_long_rows<T>(
      args, args.grad_b, sizeof(T), [&](auto pack, auto exact, const RowLayout& layout, const LaunchShape& shape) {
        launch(long_rows_kernel<T, decltype(pack)::value, decltype(exact)::value>, shape, stream, args, rule, layout);
      });
}

template <class T>
void launch_gradient(const DivergenceArguments& args, Rule rule, void* stream) {
  if (args.columns <= kExactColumns) {
    const LaunchShape shape{dim3(grid_for(args.rows * args.columns, kElementThreads)), dim3(kElementThreads)};
    return launch(short_gradient_kernel<T>, shape, stream, args, rule);
  }
  if (args.columns > kMostColumns) throw std::runtime_error("alum_kernels: expected at most 2^30 classes");
  const auto with_pack = [&](auto pack) {
    constexpr int kPack = decltype(pack)::value;
    const int64_t per_block = static_cast<int64_t>(kElementThreads) * kPack * 4;
    const int64_t across = (args.columns + per_block - 1) / per_block;
    const LaunchShape shape{dim3(grid_for(args.rows, 1), static_cast<unsigned>(across < 65535 ? across : 65535)),
                            dim3(kElementThreads)};
    launch(long_gradient_kernel<T, kPack>, shape, stream, args, rule,
           outputs_in_step<kPack>(args, sizeof(T), args.grad_a, args.grad_b, sizeof(T)));
  };
  constexpr int kWord = kWordBytes / sizeof(T);
  if (logits_in_step<kWord>(args, sizeof(T))) {
    with_pack(std::integral_constant<int, kWord>{});
  } else {
    with_pack(std::integral_constant<int, 1>{});
  }
}

void rows(const DivergenceArguments& args, void* stream) {
  with_type(args.dtype, [&](auto* like) {
    launch_rows<std::remove_pointer_t<decltype(like)>>(args, rule_of(args.divergence, args.convention), stream);
  });
}

}  // namespace

void divergence_loss(const DivergenceArguments& args, void* stream) { rows(args, stream); }

void divergence_loss_and_gradient(const DivergenceArguments& args, void* stream) { rows(args, stream); }

void divergence_gradient(const DivergenceArguments& args, void* stream) {
  with_type(args.dtype, [&](auto* like) {
    launch_gradient<std::remove_pointer_t<decltype(like)>>(args, rule_of(args.divergence, args.convention), stream);
  });
}

}  // namespace alum::cuda
