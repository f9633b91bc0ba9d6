// The lanes of the CPU kernels: GCC/Clang vectors as wide as the instruction set this file is compiled for.
#pragma once

#include "core/lane.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define ALUM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define ALUM_VECTOR_BYTES 32
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ALUM_VECTOR_BYTES 16
#else
#define ALUM_VECTOR_BYTES 16
#endif

ALUM_BEGIN

using Vec = float __attribute__((vector_size(ALUM_VECTOR_BYTES)));
using IntVec = int32_t __attribute__((vector_size(ALUM_VECTOR_BYTES)));
using UintVec = uint32_t __attribute__((vector_size(ALUM_VECTOR_BYTES)));
constexpr int kWidth = ALUM_VECTOR_BYTES / sizeof(float);

// Vectors that are summed in fp32 before the sum is carried on in double: equal terms round the same way at every step.
constexpr int kFold = 64;

template <>
struct Lane<Vec> {
  using Int = IntVec;
  using Uint = UintVec;
};

ALUM_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // the unmasked form warns in GCC 12
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__aarch64__)
  return (Vec)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Even and odd lanes are multiplied apart, to 64 bits each.
ALUM_INLINE Product<UintVec> multiply_wide(UintVec a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, x, y);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, x, 32), y);
  return {(UintVec)_mm512_mask_mov_epi32(_mm512_maskz_srli_epi64(0xff, even, 32), 0xaaaa, odd),
          (UintVec)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_maskz_slli_epi64(0xff, odd, 32))};
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return {(UintVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          (UintVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#else
  Product<UintVec> product{};
  for (int i = 0; i < kWidth; ++i) {
    const Product<uint32_t> lane = multiply_wide(static_cast<uint32_t>(a[i]), b);
    product.high[i] = lane.high;
    product.low[i] = lane.low;
  }
  return product;
#endif
}

// a[k] b[k] a[k + 1] b[k + 1] ..., from the middle with kHigh and from zero without.
template <bool kHigh>
ALUM_INLINE Vec interleave(Vec a, Vec b) {
  constexpr int kFrom = kHigh ? kWidth / 2 : 0;
#if defined(__clang__)
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = i % 2 == 0 ? a[kFrom + i / 2] : b[kFrom + i / 2];
  return x;
#else
  IntVec order{};
  for (int i = 0; i < kWidth; ++i) order[i] = kFrom + i / 2 + i % 2 * kWidth;
  return __builtin_shuffle(a, b, order);
#endif
}

// Storage types that arithmetic widens to fp32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using Half = uint16_t __attribute__((vector_size(ALUM_VECTOR_BYTES / 2)));

// fp16 bits (in the low half of each lane) to fp32 and back, for instruction sets without a conversion.
ALUM_INLINE Vec half_to_float(UintVec half) {
  const Vec magnitude = bits_as<Vec>((half & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormals included
  const UintVec special = (half & 0x7c00u) == 0x7c00u ? UintVec{} + 0x7f800000u : UintVec{};
  return bits_as<Vec>(bits_as<UintVec>(magnitude) | special | ((half & 0x8000u) << 16));
}

ALUM_INLINE UintVec float_to_half(Vec x) {
  const UintVec bits = bits_as<UintVec>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const UintVec normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const UintVec subnormal = bits_as<UintVec>(bits_as<Vec>(magnitude) + 0.5f) - 0x3f000000u;  // the adder rounds
  const UintVec finite = magnitude < 0x38800000u ? subnormal : normal;
  const UintVec bounded = magnitude >= 0x477ff000u ? UintVec{} + 0x7c00u : finite;
  return sign | (magnitude > 0x7f800000u ? UintVec{} + 0x7e00u : bounded);
}

// The low 16 bits of each lane, where the upper ones are zero.
ALUM_INLINE Half narrow(UintVec x) {
#if defined(__AVX512F__)
  return (Half)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // within 128-bit halves
  return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Half);
#endif
}

template <class T>
ALUM_INLINE T load_bytes(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// 16-bit elements, each in the low half of a lane.
ALUM_INLINE UintVec load_widened(const void* from) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_maskz_cvtepu16_epi32(0xffff, load_bytes<__m256i>(from));
#elif defined(__AVX2__)
  return (UintVec)_mm256_cvtepu16_epi32(load_bytes<__m128i>(from));
#else
  return __builtin_convertvector(load_bytes<Half>(from), UintVec);
#endif
}

ALUM_INLINE Vec load(const float* from) { return load_bytes<Vec>(from); }

ALUM_INLINE Vec load(const BFloat16* from) { return bits_as<Vec>(load_widened(from) << 16); }

ALUM_INLINE Vec load(const Float16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(from));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(load_bytes<__m128i>(from));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(load_bytes<float16x4_t>(from));
#else
  return half_to_float(load_widened(from));
#endif
}

ALUM_INLINE void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

// Round to nearest even. NaN is not rounded: what arithmetic makes is quiet, in the bits that are kept.
ALUM_INLINE void store(BFloat16* to, Vec x) {
  const UintVec bits = bits_as<UintVec>(x);
  const UintVec round = ((bits >> 16) & 1u) + 0x7fffu;
  const Half half = narrow((bits + (x == x ? round : UintVec{})) >> 16);
  std::memcpy(to, &half, sizeof(half));
}

ALUM_INLINE void store(Float16* to, Vec x) {
#if defined(__AVX512F__)
  const auto half = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const auto half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const auto half = vcvt_f16_f32((float32x4_t)x);
#else
  const Half half = narrow(float_to_half(x));
#endif
  std::memcpy(to, &half, sizeof(half));
}

// The first `count` elements; lanes beyond them hold `fill`.
template <class T>
ALUM_INLINE Vec load_partial(const T* from, int64_t count, Vec fill) {
  T buffer[kWidth];
  store(buffer, fill);
  std::memcpy(buffer, from, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
ALUM_INLINE void store_partial(T* to, Vec x, int64_t count) {
  T buffer[kWidth];
  store(buffer, x);
  std::memcpy(to, buffer, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
ALUM_INLINE Vec load_some(const T* from, int64_t count) {
  return count == kWidth ? load(from) : load_partial(from, count, Vec{});
}

template <class T>
ALUM_INLINE void store_some(T* to, Vec x, int64_t count) {
  if (count == kWidth) {
    store(to, x);
  } else {
    store_partial(to, x, count);
  }
}

// x as the storage type holds it.
ALUM_INLINE Vec rounded_to(const float*, Vec x) { return x; }
template <class T>
ALUM_INLINE Vec rounded_to(const T*, Vec x) {
  T buffer[kWidth];
  store(buffer, x);
  return load(buffer);
}

template <class T>
ALUM_INLINE float widen(T x) {
  T buffer[kWidth] = {x};
  return load(buffer)[0];
}

ALUM_INLINE Vec gather(const float* from, IntVec index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)index, from, 4);
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(from, (__m256i)index, 4);
#else
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = from[index[i]];
  return x;
#endif
}

ALUM_INLINE float sum_lanes(Vec x) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

ALUM_INLINE float max_lanes(Vec x) {
  float best = x[0];
  for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

ALUM_INLINE bool any_lane(IntVec mask) {
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= mask[i];
  return any != 0;
}

ALUM_END
