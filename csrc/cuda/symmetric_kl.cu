// Divergences between softmaxes on CUDA. Formulas: core/divergence.h, core/exact_row.h, core/long_row.h.
//
//   loss                 reads a, b (N, V)                    writes loss (N,), statistics (5, N)
//   gradient             reads a, b, statistics, grad_rows    writes da, db (N, V)
//   loss and gradient    reads a, b, row_weight               writes loss (N,), da (N, V)
//
// Rows of up to 64 classes: a thread a row. Longer rows: a block a row, in sweeps over what each thread read at first:
// both rows are staged in shared memory where they fit, and read again from L2 where they do not. Sums are fp32 in a
// thread and double across threads, in a fixed order. Loss alone and loss with gradient are one kernel, which writes
// gradients where it is given room for them.
#include "core/long_row.h"
#include "cuda/launch.h"
#include "cuda/runtime.cuh"

namespace alum::cuda {
namespace {

constexpr int kShortRowThreads = 128;
constexpr int kElementThreads = 256;
constexpr int kMostRowThreads = 768;

// The gradient of one class as it is stored: zero without upstream, NaN where the row has none.
__device__ __forceinline__ float settled(float gradient, float upstream, bool undefined) {
  return upstream == 0.0f ? 0.0f : undefined ? __builtin_nanf("") : gradient * upstream;
}

// ---- rows of up to 64 classes ----

template <class T>
__global__ void __launch_bounds__(kShortRowThreads) short_rows_kernel(DivergenceArguments args, Rule rule) {
  const int columns = static_cast<int>(args.columns);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kShortRowThreads;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kShortRowThreads + threadIdx.x; n < args.rows; n += stride) {
    const float weight = args.weight_of(n);
    const T* a = static_cast<const T*>(args.a.data) + args.a.strides.offset(n);
    const T* b = static_cast<const T*>(args.b.data) + args.b.strides.offset(n);
    const auto logits = [&](int v) { return two_logits(widen(a[v]), widen(b[v])); };
    ExactRow<float> row{};
    if (weight != 0.0f) row = exact_row<float, 0>(args.divergence, logits, columns, args.inv_temperature);
    args.loss[n] = row.loss;
    if (args.grad_a == nullptr) {
      store_statistics(args, n, row.statistics);
      continue;
    }
    T* grad = static_cast<T*>(args.grad_a) + n * args.columns;
    const bool undefined = row.statistics.lse_b != row.statistics.lse_b;
    const float upstream = weight * args.grad_scale * args.inv_temperature;
    for (int v = 0; v < columns; ++v) {
      float da = 0.0f;
      if (weight != 0.0f) da = class_gradient(rule, logits(v), row.statistics, args.inv_temperature).da;
      grad[v] = narrow<T>(settled(da, upstream, undefined));
    }
  }
}

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

// ---- longer rows ----

// Shared memory begins with the room of the reductions; staged rows follow it.
constexpr size_t kRoomBytes = kWarp * sizeof(NarrowSums<double>);

// The two rows of a block. A thread reads the same elements in every sweep, so that what it staged needs no barrier.
// Rows and columns are counted in 32 bits, addresses in 64: a block of 768 threads has 80 registers a thread.
template <class T, int kPack>
class BlockRow {
 public:
  __device__ BlockRow(const DivergenceArguments& args, int64_t n, bool staged)
      : a_(static_cast<const T*>(args.a.data) + args.a.strides.offset(n)),
        b_(static_cast<const T*>(args.b.data) + args.b.strides.offset(n)),
        columns_(static_cast<uint32_t>(args.columns)),
        staged_(staged) {}

  // body(a, b) for the thread's elements, read from memory and staged where there is room.
  template <class Body>
  __device__ __forceinline__ void first(const Body& body) {
    sweep(a_, b_, [&](uint32_t v, const Pack<T, kPack>& a, const Pack<T, kPack>& b) {
      if (staged_) {
        *reinterpret_cast<Pack<T, kPack>*>(stage() + v) = a;
        *reinterpret_cast<Pack<T, kPack>*>(stage() + padded() + v) = b;
      }
      spread(a, b, body);
    });
  }

  // The same from where `first` left them.
  template <class Body>
  __device__ __forceinline__ void again(const Body& body) const {
    sweep_again([&](uint32_t, const Pack<T, kPack>& a, const Pack<T, kPack>& b) { spread(a, b, body); });
  }

  // to[v] = body(a, b) likewise.
  template <class Body>
  __device__ __forceinline__ void write(T* to, const Body& body) const {
    sweep_again([&](uint32_t v, const Pack<T, kPack>& a, const Pack<T, kPack>& b) {
      Pack<T, kPack> values;
#pragma unroll
      for (int i = 0; i < kPack; ++i) values.values[i] = narrow<T>(body(widen(a.values[i]), widen(b.values[i])));
      *reinterpret_cast<Pack<T, kPack>*>(to + v) = values;
    });
  }

  // Elements of one row in shared memory, a whole number of 16-byte words.
  __host__ __device__ static int64_t padded(int64_t columns) {
    constexpr int64_t kWord = 16 / sizeof(T);
    return (columns + kWord - 1) / kWord * kWord;
  }

 private:
  __device__ __forceinline__ uint32_t padded() const { return static_cast<uint32_t>(padded(columns_)); }

  // Not kept as a pointer: an address that is seen to be in shared memory takes 32 bits and the cheaper instructions.
  static __device__ __forceinline__ T* stage() { return reinterpret_cast<T*>(dynamic_shared + kRoomBytes); }

  template <class Each>
  __device__ __forceinline__ void sweep(const T* a, const T* b, const Each& each) const {
    for (uint32_t v = threadIdx.x * kPack; v < columns_; v += blockDim.x * kPack) {
      each(v, *reinterpret_cast<const Pack<T, kPack>*>(a + v), *reinterpret_cast<const Pack<T, kPack>*>(b + v));
    }
  }

  template <class Each>
  __device__ __forceinline__ void sweep_again(const Each& each) const {
    if (staged_) {
      sweep(stage(), stage() + padded(), each);
    } else {
      sweep(a_, b_, each);
    }
  }

  template <class Body>
  static __device__ __forceinline__ void spread(const Pack<T, kPack>& a, const Pack<T, kPack>& b, const Body& body) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) body(widen(a.values[i]), widen(b.values[i]));
  }

  const T* a_;
  const T* b_;
  uint32_t columns_;
  bool staged_;
};

struct ThreadExtremes {
  float max_a, max_b, a_at_max_b;
  int irregular, one_sided;
};

template <class Row>
__device__ __forceinline__ RowExtremes row_extremes(Row& row, unsigned char* room) {
  const float none = -__builtin_inff();
  ThreadExtremes x{none, none, none, 0, 0};
  row.first([&](float a, float b) {
    if (b > x.max_b) {
      x.max_b = b;
      x.a_at_max_b = a;
    }
    x.max_a = larger_of(a, x.max_a);
    x.irregular |= is_regular(a, b) ? 0 : 1;
    x.one_sided |= is_one_sided(a, b) ? 1 : 0;
  });
  x = block_reduce(x, reinterpret_cast<ThreadExtremes*>(room), [](const ThreadExtremes& p, const ThreadExtremes& q) {
    const bool second = q.max_b > p.max_b;
    return ThreadExtremes{larger_of(q.max_a, p.max_a), second ? q.max_b : p.max_b, second ? q.a_at_max_b : p.a_at_max_b,
                          p.irregular | q.irregular, p.one_sided | q.one_sided};
  });
  return {x.max_a, x.max_b, exact_difference(x.a_at_max_b, x.max_b), x.irregular == 0 && x.max_b > none,
          x.one_sided != 0};
}

// Sums over the block: fp32 in a thread, double across threads.
__device__ __forceinline__ NarrowSums<double> widened(const NarrowSums<float>& s) {
  return {s.l1, s.l2, s.p, s.a, s.b, s.c};
}
__device__ __forceinline__ WideSums<double> widened(const WideSums<float>& s) { return {s.l1, s.l2, s.p, s.a}; }
__device__ __forceinline__ TermSums<double> widened(const TermSums<float>& s) { return {s.up, s.down, s.l1, s.l2}; }

__device__ __forceinline__ NarrowSums<double> plus(const NarrowSums<double>& x, const NarrowSums<double>& y) {
  return {x.l1 + y.l1, x.l2 + y.l2, x.p + y.p, x.a + y.a, x.b + y.b, x.c + y.c};
}
__device__ __forceinline__ WideSums<double> plus(const WideSums<double>& x, const WideSums<double>& y) {
  return {x.l1 + y.l1, x.l2 + y.l2, x.p + y.p, x.a + y.a};
}
__device__ __forceinline__ TermSums<double> plus(const TermSums<double>& x, const TermSums<double>& y) {
  return {x.up + y.up, x.down + y.down, x.l1 + y.l1, x.l2 + y.l2};
}

template <template <class> class Sums, class Row, class Add>
__device__ __forceinline__ Sums<double> sum_row(const Row& row, unsigned char* room, const Add& add) {
  Sums<float> sums;
  row.again([&](float a, float b) { add(sums, a, b); });
  return block_reduce(widened(sums), reinterpret_cast<Sums<double>*>(room),
                      [](const Sums<double>& x, const Sums<double>& y) { return plus(x, y); });
}

template <bool kExact, class Row>
__device__ __forceinline__ RowResult row_result(const Row& row, const RowExtremes& x, float inv_temperature,
                                                unsigned char* room) {
  if (x.gap(inv_temperature) <= kNarrow) {
    const auto sums = sum_row<NarrowSums>(row, room, [&](NarrowSums<float>& s, float a, float b) {
      add_narrow<kExact>(s, two_logits(a, b), x, inv_temperature);
    });
    return finish_narrow(sums, x, inv_temperature);
  }
  const auto sums = sum_row<WideSums>(row, room, [&](WideSums<float>& s, float a, float b) {
    add_wide<kExact>(s, two_logits(a, b), x, inv_temperature);
  });
  return finish_wide(sums, x, inv_temperature);
}

// Statistics and loss of a row that a block holds.
template <bool kExact, class Row>
__device__ __forceinline__ float analyse_row(Row& row, const DivergenceArguments& args, RowStatistics<float>& stats,
                                             unsigned char* room) {
  const RowExtremes x = row_extremes(row, room);
  if (!x.regular || x.one_sided) {
    const float nan = __builtin_nanf("");
    stats = {nan, nan, nan, nan, nan};
    return x.regular ? __builtin_inff() : nan;
  }
  const RowResult result = row_result<kExact>(row, x, args.inv_temperature, room);
  stats = result.statistics;
  if (args.divergence == Divergence::kSymmetricKl && args.columns > kTermwiseColumns) return result.symmetric_kl;
  return finish_terms(sum_row<TermSums>(row, room, [&](TermSums<float>& s, float a, float b) {
    s.add(two_logits(a, b), x, args.inv_temperature, stats.log_ratio, args.divergence);
  }));
}

// The bound is what lets a block of all its threads have registers enough: without it some architectures get 74 a thread.
template <class T, int kPack, bool kExact>
__global__ void __launch_bounds__(kMostRowThreads) long_rows_kernel(DivergenceArguments args, Rule rule, bool staged) {
  unsigned char* room = dynamic_shared;
  for (uint32_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    BlockRow<T, kPack> row(args, n, staged);
    const float weight = args.weight_of(n);
    RowStatistics<float> stats{};
    float loss = 0.0f;
    if (weight != 0.0f) loss = analyse_row<kExact>(row, args, stats, room);
    if (threadIdx.x == 0) {
      args.loss[n] = loss;
      if (args.grad_a == nullptr) store_statistics(args, n, stats);
    }
    if (args.grad_a == nullptr) continue;
    T* grad = static_cast<T*>(args.grad_a) + int64_t{n} * args.columns;
    const float upstream = weight * args.grad_scale * args.inv_temperature;
    const bool undefined = stats.lse_b != stats.lse_b;
    if (upstream == 0.0f || undefined) {
      for (int64_t v = threadIdx.x; v < args.columns; v += blockDim.x) {
        grad[v] = narrow<T>(settled(0.0f, upstream, undefined));
      }
      continue;
    }
    row.write(grad, [&](float a, float b) {
      return class_gradient(rule, two_logits(a, b), stats, args.inv_temperature).da * upstream;
    });
  }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kElementThreads) long_gradient_kernel(DivergenceArguments args, Rule rule) {
  for (int64_t n = blockIdx.x; n < args.rows; n += gridDim.x) {
    const float upstream = args.grad_rows.at(n) * args.inv_temperature;
    const RowStatistics<float> stats = load_statistics(args, n);
    const bool undefined = stats.lse_b != stats.lse_b, silent = upstream == 0.0f;
    const T* from_a = static_cast<const T*>(args.a.data) + args.a.strides.offset(n);
    const T* from_b = static_cast<const T*>(args.b.data) + args.b.strides.offset(n);
    T* to_a = args.grad_a == nullptr ? nullptr : static_cast<T*>(args.grad_a) + n * args.columns;
    T* to_b = args.grad_b == nullptr ? nullptr : static_cast<T*>(args.grad_b) + n * args.columns;
    const int64_t step = static_cast<int64_t>(gridDim.y) * kElementThreads * kPack;
    for (int64_t v = (static_cast<int64_t>(blockIdx.y) * kElementThreads + threadIdx.x) * kPack; v < args.columns;
         v += step) {
      Pack<T, kPack> da, db;
      if (undefined || silent) {
        for (int i = 0; i < kPack; ++i) da.values[i] = db.values[i] = narrow<T>(settled(0.0f, upstream, undefined));
      } else {
        const Pack<T, kPack> a = *reinterpret_cast<const Pack<T, kPack>*>(from_a + v);
        const Pack<T, kPack> b = *reinterpret_cast<const Pack<T, kPack>*>(from_b + v);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const Logits<float> x = two_logits(widen(a.values[i]), widen(b.values[i]));
          const Gradients<float> g = class_gradient(rule, x, stats, args.inv_temperature);
          da.values[i] = narrow<T>(g.da * upstream);
          db.values[i] = narrow<T>(g.db * upstream);
        }
      }
      if (to_a != nullptr) *reinterpret_cast<Pack<T, kPack>*>(to_a + v) = da;
      if (to_b != nullptr) *reinterpret_cast<Pack<T, kPack>*>(to_b + v) = db;
    }
  }
}

// ---- choosing a kernel ----

bool multiple_of(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether every row of every tensor can be moved in 16-byte words.
template <class T>
bool rows_in_words(const DivergenceArguments& args) {
  constexpr int64_t kWord = 16 / sizeof(T);
  const auto even = [](const LogitRows& rows) {
    return multiple_of(rows.data, 16) && rows.strides.inner_step % kWord == 0 && rows.strides.outer_step % kWord == 0;
  };
  return args.columns % kWord == 0 && even(args.a) && even(args.b) && multiple_of(args.grad_a, 16) &&
         multiple_of(args.grad_b, 16);
}

// run(std::integral_constant<int, elements of an access>)
template <class T, class Run>
void with_pack(const DivergenceArguments& args, const Run& run) {
  if (rows_in_words<T>(args)) {
    run(std::integral_constant<int, 16 / sizeof(T)>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

int row_threads(int64_t columns) {
  return columns <= 1024 ? 128 : columns <= 8192 ? 256 : columns <= 32768 ? 512 : kMostRowThreads;
}

// What 32 bits count, with a grid or a block added.
constexpr int64_t kMostRows = int64_t{1} << 31, kMostColumns = kMostRows;

template <class T>
void launch_rows(const DivergenceArguments& args, Rule rule, void* stream) {
  if (args.columns <= kExactColumns) {
    const LaunchShape shape{dim3(grid_for(args.rows, kShortRowThreads)), dim3(kShortRowThreads)};
    return launch(short_rows_kernel<T>, shape, stream, args, rule);
  }
  if (args.rows > kMostRows || args.columns > kMostColumns) {
    throw std::runtime_error("alum_kernels: expected at most 2^31 rows of at most 2^31 classes");
  }
  with_pack<T>(args, [&](auto pack) {
    constexpr int kPack = decltype(pack)::value;
    const size_t stage = 2 * static_cast<size_t>(BlockRow<T, kPack>::padded(args.columns)) * sizeof(T);
    const size_t room = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    const bool staged = kRoomBytes + stage <= room;
    LaunchShape shape{dim3(grid_for(args.rows, 1)), dim3(static_cast<unsigned>(row_threads(args.columns)))};
    shape.shared_bytes = kRoomBytes + (staged ? stage : 0);
    if (args.columns <= kExactRowColumns) {
      return launch(long_rows_kernel<T, kPack, true>, shape, stream, args, rule, staged);
    }
    launch(long_rows_kernel<T, kPack, false>, shape, stream, args, rule, staged);
  });
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
    using T = std::remove_pointer_t<decltype(like)>;
    const Rule rule = rule_of(args.divergence, args.convention);
    if (args.columns <= kExactColumns) {
      const LaunchShape shape{dim3(grid_for(args.rows * args.columns, kElementThreads)), dim3(kElementThreads)};
      return launch(short_gradient_kernel<T>, shape, stream, args, rule);
    }
    with_pack<T>(args, [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
      const int64_t per_block = static_cast<int64_t>(kElementThreads) * kPack * 4;
      const int64_t across = (args.columns + per_block - 1) / per_block;
      const LaunchShape shape{dim3(grid_for(args.rows, 1), static_cast<unsigned>(across < 65535 ? across : 65535)),
                              dim3(kElementThreads)};
      launch(long_gradient_kernel<T, kPack>, shape, stream, args, rule);
    });
  });
}

}  // namespace alum::cuda
