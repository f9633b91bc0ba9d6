// The arithmetic type of every formula in core/: one float on a GPU, a vector of floats on a CPU.
//
// A formula is written once as a template over F. On a CPU, F is a GCC/Clang vector type and every operation acts on
// all of its lanes; comparisons give a lane mask, and `mask ? x : y` selects per lane. On a GPU and in scalar tails, F
// is float and the same source reads as ordinary code.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/isa.h"

ALUM_BEGIN

template <class F>
struct Lane;

template <>
struct Lane<float> {
  using Int = int32_t;
  using Uint = uint32_t;
};

// Same bits, other type.
template <class To, class From>
ALUM_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
#if defined(__CUDA_ARCH__)
  return reinterpret_cast<const To&>(x);
#else
  To to;
  std::memcpy(&to, &x, sizeof(To));
  return to;
#endif
}

template <class F>
ALUM_INLINE F broadcast(float x) {
  return F{} + x;
}

// NaN in x gives y.
template <class F>
ALUM_INLINE F larger_of(F x, F y) {
  return x > y ? x : y;
}

template <class F>
ALUM_INLINE F absolute(F x) {
  using I = typename Lane<F>::Int;
  return bits_as<F>(bits_as<I>(x) & 0x7fffffff);
}

ALUM_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// Both words of 32 x 32 bit products.
template <class U>
struct Product {
  U high, low;
};

ALUM_INLINE Product<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return {__umulhi(a, b), a * b};
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

ALUM_INLINE bool any_lane(bool mask) { return mask; }

ALUM_END
