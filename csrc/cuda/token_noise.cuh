// Four neighbouring features of a token: the unit in which noise is drawn and (B, S, H) tensors are read and written.
#pragma once

#include <type_traits>

#include "core/philox.h"
#include "cuda/runtime.cuh"

namespace alum::cuda {

// std times unit noise of features [h, h + 4); h is a multiple of four.
__device__ __forceinline__ Quad<float> draw_four(const NoiseSource& noise, float std, int64_t sample, int64_t position,
                                                 int64_t h) {
  const Words<uint32_t> counter{static_cast<uint32_t>(h / 4), static_cast<uint32_t>(position),
                                static_cast<uint32_t>(noise.sample_offset + sample), noise.stream};
  const Quad<float> z = unit_noise<float>(philox(static_cast<uint64_t>(*noise.seed), counter), noise.normal);
  return {std * z.x0, std * z.x1, std * z.x2, std * z.x3};
}

template <class T>
__device__ __forceinline__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(T)) == 0;
}

// The first `count` of four elements; the others are zero.
template <class T>
__device__ __forceinline__ Quad<float> load_four(const T* from, int count) {
  if (count == 4 && is_aligned(from)) {
    const Pack<T, 4> p = *reinterpret_cast<const Pack<T, 4>*>(from);
    return {widen(p.values[0]), widen(p.values[1]), widen(p.values[2]), widen(p.values[3])};
  }
  Quad<float> x{};
  if (count > 0) x.x0 = widen(from[0]);
  if (count > 1) x.x1 = widen(from[1]);
  if (count > 2) x.x2 = widen(from[2]);
  if (count > 3) x.x3 = widen(from[3]);
  return x;
}

template <class T>
__device__ __forceinline__ void store_four(T* to, const Quad<float>& x, int count) {
  if (count == 4 && is_aligned(to)) {
    *reinterpret_cast<Pack<T, 4>*>(to) = {{narrow<T>(x.x0), narrow<T>(x.x1), narrow<T>(x.x2), narrow<T>(x.x3)}};
    return;
  }
  if (count > 0) to[0] = narrow<T>(x.x0);
  if (count > 1) to[1] = narrow<T>(x.x1);
  if (count > 2) to[2] = narrow<T>(x.x2);
  if (count > 3) to[3] = narrow<T>(x.x3);
}

// Sums that no product behind them is fused into: embeds + delta is that of the delta that is returned.
__device__ __forceinline__ Quad<float> add(const Quad<float>& x, const Quad<float>& y) {
  return {__fadd_rn(x.x0, y.x0), __fadd_rn(x.x1, y.x1), __fadd_rn(x.x2, y.x2), __fadd_rn(x.x3, y.x3)};
}

}  // namespace alum::cuda
