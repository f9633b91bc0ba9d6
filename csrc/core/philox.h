// Philox4x32-10 (Salmon et al., SC 2011) and the unit noise made of its words.
//
//   words = Philox(key = (seed_lo, seed_hi), counter = (h / 4, s, sample_offset + b, stream))   lane h % 4
//   v     = (word >> 9) 2^-23 + 2^-24
//   uniform 2 v - 1;  normal sqrt(-2 ln v0) (cos, sin)(2 pi v1) on lanes (0, 1), and the same on (2, 3)
#pragma once

#include "core/elementary.h"

ALUM_BEGIN

template <class U>
struct Words {
  U x0, x1, x2, x3;
};

// Several counters at once: a round waits for the one before it, and the counters do not wait for each other.
template <class U, int kCount>
ALUM_INLINE void philox(uint64_t seed, Words<U> (&counters)[kCount]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    ALUM_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Words<U> x = counters[i];
      const Product<U> first = multiply_wide(x.x0, 0xD2511F53u), second = multiply_wide(x.x2, 0xCD9E8D57u);
      counters[i] = {second.high ^ x.x1 ^ key0, second.low, first.high ^ x.x3 ^ key1, first.low};
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

template <class U>
ALUM_INLINE Words<U> philox(uint64_t seed, Words<U> counter) {
  Words<U> counters[1] = {counter};
  philox(seed, counters);
  return counters[0];
}

// Uniform on (0, 1), a multiple of 2^-24 that fp32 holds exactly: the 23 top bits become the mantissa of 1.f.
template <class F, class U>
ALUM_INLINE F unit_interval(U word) {
  return bits_as<F>((word >> 9) | 0x3f800000u) - (1.0f - 5.9604644775390625e-08f);
}

template <class F>
struct Quad {
  F x0, x1, x2, x3;
};

// Two independent standard normals from two uniforms; the quadrant is taken off exactly before cosine and sine.
template <class F>
ALUM_INLINE void box_muller(F v0, F v1, F& first, F& second) {
  using I = typename Lane<F>::Int;
  const F radius = square_root(-2.0f * log(v0));
  const F turns = 4.0f * v1;
  const F shifted = turns + 12582912.0f;
  const I quadrant = bits_as<I>(shifted) & 3;
  const F f = turns - (shifted - 12582912.0f);
  const F c = radius * cos_quarter(f), s = radius * sin_quarter(f);
  const F even_or_odd_c = (quadrant & 1) != 0 ? -s : c, even_or_odd_s = (quadrant & 1) != 0 ? c : s;
  first = (quadrant & 2) != 0 ? -even_or_odd_c : even_or_odd_c;
  second = (quadrant & 2) != 0 ? -even_or_odd_s : even_or_odd_s;
}

template <class F, class U>
ALUM_INLINE Quad<F> unit_noise(Words<U> words, bool normal) {
  const F v0 = unit_interval<F>(words.x0), v1 = unit_interval<F>(words.x1);
  const F v2 = unit_interval<F>(words.x2), v3 = unit_interval<F>(words.x3);
  Quad<F> z;
  if (normal) {
    box_muller(v0, v1, z.x0, z.x1);
    box_muller(v2, v3, z.x2, z.x3);
  } else {
    z = {2.0f * v0 - 1.0f, 2.0f * v1 - 1.0f, 2.0f * v2 - 1.0f, 2.0f * v3 - 1.0f};
  }
  return z;
}

ALUM_END
