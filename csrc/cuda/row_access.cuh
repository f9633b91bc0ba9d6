// Rows in memory, in words of 16 bytes wherever they begin.
//
// A vocabulary is seldom a multiple of a word (30,522 and 50,265 are not), so that each row begins elsewhere in one. A
// row is cut at the words of memory, not at its own beginning: `shift` is how many elements of its first word belong to
// the row before. The first and the last word go element by element.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/runtime.cuh"

namespace alum::cuda {

// Elements of its word that lie before a row.
template <int kPack, class T>
__host__ __device__ __forceinline__ int shift_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPack);
}

// row[v] ... row[v + kPack - 1], `none` where that is outside of the row.
template <int kPack, class T>
__device__ __forceinline__ Pack<T, kPack> load_pack(const T* row, int v, int columns, float none) {
  if (v >= 0 && v + kPack <= columns) return *reinterpret_cast<const Pack<T, kPack>*>(row + v);
  Pack<T, kPack> pack;
#pragma unroll
  for (int i = 0; i < kPack; ++i) pack.values[i] = v + i >= 0 && v + i < columns ? row[v + i] : narrow<T>(none);
  return pack;
}

// The same to shared memory, where this thread finds it after wait_for_fetched(): whole words go there past the
// registers.
template <int kPack, class T>
__device__ __forceinline__ void fetch_pack(Pack<T, kPack>* to, const T* row, int v, int columns, float none) {
  if constexpr (sizeof(*to) == 16) {
    if (v >= 0 && v + kPack <= columns) return __pipeline_memcpy_async(to, row + v, sizeof(*to));
  }
  *to = load_pack<kPack>(row, v, columns, none);
}

__device__ __forceinline__ void wait_for_fetched() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// Stores what of the pack is inside of the row; `in_step` if row + v is aligned to a pack.
template <int kPack, class T>
__device__ __forceinline__ void store_pack(T* row, int v, int columns, bool in_step, const Pack<T, kPack>& pack) {
  if (in_step && v >= 0 && v + kPack <= columns) {
    *reinterpret_cast<Pack<T, kPack>*>(row + v) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (v + i >= 0 && v + i < columns) row[v + i] = pack.values[i];
  }
}

// The shift of row n is (first + n step) modulo kPack, if `regular`.
struct RowPhase {
  int64_t first, step;
  bool regular;

  bool in_step_with(const RowPhase& other) const {
    return regular && other.regular && first == other.first && step == other.step;
  }
};

template <int kPack>
RowPhase phase_of(const void* data, size_t element_bytes, const RowStrides& strides, int64_t rows) {
  const auto within = [](int64_t x) { return (x % kPack + kPack) % kPack; };
  const bool regular = strides.inner >= rows || within(strides.outer_step - strides.inner * strides.inner_step) == 0;
  return {static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / element_bytes % kPack), within(strides.inner_step),
          regular};
}

// Whether the rows of a and b are cut at the same places.
template <int kPack>
bool logits_in_step(const DivergenceArguments& args, size_t element_bytes) {
  return phase_of<kPack>(args.a.data, element_bytes, args.a.strides, args.rows)
      .in_step_with(phase_of<kPack>(args.b.data, element_bytes, args.b.strides, args.rows));
}

// Whether the rows of these outputs (null: none) are cut where those of a are.
template <int kPack>
bool outputs_in_step(const DivergenceArguments& args, size_t element_bytes, const void* first, const void* second,
                     size_t output_bytes) {
  const RowPhase a = phase_of<kPack>(args.a.data, element_bytes, args.a.strides, args.rows);
  const RowStrides strides{args.rows, 0, args.columns};
  const auto in_step = [&](const void* output) {
    return output == nullptr || phase_of<kPack>(output, output_bytes, strides, args.rows).in_step_with(a);
  };
  return in_step(first) && in_step(second);
}

}  // namespace alum::cuda
