// Rows of up to 64 classes: a thread a row, a block a tile of as many rows as it has threads. Formulas: core/exact_row.h.
//
//   loss                 reads a, b (N, V), row_weight        writes loss (N,), statistics (5, N)
//   loss and gradient    reads a, b, row_weight               writes loss (N,), da, db (N, V)
//
// The tile lies in shared memory, so that global memory is read and written in order; gradients take the place of the
// logits in it. Rows of a tile are an odd number of 32-bit words apart (row_plan.h): threads read from different banks.
#pragma once

#include "core/exact_row.h"
#include "cuda/row_plan.h"
#include "cuda/runtime.cuh"

namespace alum::cuda {

constexpr int kMostTileRows = 128;

// The gradient of one class as it is stored: zero without upstream, NaN where the row has none.
__device__ __forceinline__ float settled(float gradient, float upstream, bool undefined) {
  return upstream == 0.0f ? 0.0f : undefined ? __builtin_nanf("") : gradient * upstream;
}

// body(r, v) for the elements of `count` rows, neighbours by neighbouring threads.
template <class Body>
__device__ __forceinline__ void each_of_tile(int count, int columns, const Body& body) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int rows_on = threads / columns, columns_on = threads % columns;
  for (int r = thread / columns, v = thread % columns; r < count;) {
    body(r, v);
    r += rows_on;
    v += columns_on;
    if (v >= columns) {
      v -= columns;
      ++r;
    }
  }
}

template <class T>
__device__ __forceinline__ void one_short_row(const DivergenceArguments& args, Rule rule, int64_t n, T* a, T* b) {
  const int columns = static_cast<int>(args.columns);
  const float weight = args.weight_of(n);
  const auto logits = [&](int v) { return two_logits(widen(a[v]), widen(b[v])); };
  ExactRow<float> row{};
  if (weight != 0.0f) row = exact_row<float, 0>(args.divergence, logits, columns, args.inv_temperature);
  args.loss[n] = row.loss;
  if (args.statistics != nullptr) store_statistics(args, n, row.statistics);
  if (args.grad_a == nullptr) return;
  const bool undefined = row.statistics.lse_b != row.statistics.lse_b;
  const float upstream = weight * args.grad_scale * args.inv_temperature;
  for (int v = 0; v < columns; ++v) {
    Gradients<float> g{0.0f, 0.0f};
    if (weight != 0.0f) g = class_gradient(rule, logits(v), row.statistics, args.inv_temperature);
    a[v] = narrow<T>(settled(g.da, upstream, undefined));
    b[v] = narrow<T>(settled(g.db, upstream, undefined));
  }
}

template <class T>
__global__ void __launch_bounds__(kMostTileRows) short_rows_kernel(DivergenceArguments args, Rule rule) {
  const int columns = static_cast<int>(args.columns), tile = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x), pitch = tile_pitch(columns, sizeof(T));
  int64_t* const begin_a = reinterpret_cast<int64_t*>(dynamic_shared);  // (tile,) where a row begins in memory
  int64_t* const begin_b = begin_a + tile;
  T* const tile_a = reinterpret_cast<T*>(begin_b + tile);  // (tile, pitch)
  T* const tile_b = tile_a + tile * pitch;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * tile;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile; first < args.rows; first += stride) {
    const int count = static_cast<int>(args.rows - first < tile ? args.rows - first : tile);
    if (thread < count) {
      begin_a[thread] = args.a.strides.offset(first + thread);
      begin_b[thread] = args.b.strides.offset(first + thread);
    }
    __syncthreads();
    const T* const a = static_cast<const T*>(args.a.data);
    const T* const b = static_cast<const T*>(args.b.data);
    each_of_tile(count, columns, [&](int r, int v) {
      tile_a[r * pitch + v] = a[begin_a[r] + v];
      tile_b[r * pitch + v] = b[begin_b[r] + v];
    });
    __syncthreads();
    if (thread < count) one_short_row(args, rule, first + thread, tile_a + thread * pitch, tile_b + thread * pitch);
    __syncthreads();
    if (args.grad_a == nullptr) continue;
    T* const to_a = static_cast<T*>(args.grad_a) + first * columns;
    T* const to_b = args.grad_b == nullptr ? nullptr : static_cast<T*>(args.grad_b) + first * columns;
    each_of_tile(count, columns, [&](int r, int v) {
      to_a[r * columns + v] = tile_a[r * pitch + v];
      if (to_b != nullptr) to_b[r * columns + v] = tile_b[r * pitch + v];
    });
    // the next tile is staged after a barrier at least
  }
}

}  // namespace alum::cuda
