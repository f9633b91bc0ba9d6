// The noise of one token, and loops over a token's features.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "core/arguments.h"
#include "cpu/simd.h"
#include "core/philox.h"

ALUM_BEGIN

// Vectors of Philox counters at a time, and the features that they serve.
constexpr int kCounters = 2;
constexpr int kChunk = 4 * kWidth * kCounters;

// Unit noise of features [h, h + kChunk) of a token, times std, into `chunk`. h is a multiple of four.
// One function that every kernel calls: inlined into each, it would be most of the module.
ALUM_NOINLINE inline void draw_chunk(const NoiseSource& noise, float std, int64_t sample, int64_t position, int64_t h,
                                     float* chunk) {
  const UintVec zero{};
  UintVec group;
  for (int i = 0; i < kWidth; ++i) group[i] = static_cast<uint32_t>(h / 4 + i);
  Words<UintVec> words[kCounters];
  for (int k = 0; k < kCounters; ++k) {
    words[k] = {group + static_cast<uint32_t>(k * kWidth), zero + static_cast<uint32_t>(position),
                zero + static_cast<uint32_t>(noise.sample_offset + sample), zero + noise.stream};
  }
  philox(static_cast<uint64_t>(*noise.seed), words);
  for (int k = 0; k < kCounters; ++k) {
    const Quad<Vec> z = unit_noise<Vec>(words[k], noise.normal);
    float* to = chunk + k * 4 * kWidth;
    // features in order: x0[0] x1[0] x2[0] x3[0] x0[1] ...
    const Vec even_low = interleave<false>(z.x0, z.x2), odd_low = interleave<false>(z.x1, z.x3);
    const Vec even_high = interleave<true>(z.x0, z.x2), odd_high = interleave<true>(z.x1, z.x3);
    store(to, std * interleave<false>(even_low, odd_low));
    store(to + kWidth, std * interleave<true>(even_low, odd_low));
    store(to + 2 * kWidth, std * interleave<false>(even_high, odd_high));
    store(to + 3 * kWidth, std * interleave<true>(even_high, odd_high));
  }
}

// Calls body(h, count, x) for every vector of features [begin, end) of a token; count < kWidth in the last one only,
// where lanes beyond it hold zero.
template <class T, class Body>
ALUM_INLINE void for_each_vector(const T* row, int64_t begin, int64_t end, const Body& body) {
  int64_t h = begin;
  for (; h + kWidth <= end; h += kWidth) body(h, std::integral_constant<int64_t, kWidth>{}, load(row + h));
  if (h < end) body(h, end - h, load_partial(row + h, end - h, Vec{}));
}

template <class T, class Body>
ALUM_INLINE void for_each_vector(const T* row, int64_t hidden, const Body& body) {
  for_each_vector(row, 0, hidden, body);
}

// Unit noise times std of all features of a token; `row` has room for a multiple of kChunk.
ALUM_INLINE void draw_row(const NoiseSource& noise, float std, int64_t sample, int64_t position, int64_t hidden,
                          float* row) {
  for (int64_t h = 0; h < hidden; h += kChunk) draw_chunk(noise, std, sample, position, h, row + h);
}

// Room for one token's noise, or none.
class NoiseRow {
 public:
  explicit NoiseRow(int64_t hidden)
      : data_(hidden == 0 ? nullptr
                          : static_cast<float*>(std::malloc(static_cast<size_t>(hidden + kChunk) * sizeof(float)))) {
    if (hidden != 0 && data_ == nullptr) throw std::bad_alloc();
  }
  ~NoiseRow() { std::free(data_); }
  NoiseRow(const NoiseRow&) = delete;
  NoiseRow& operator=(const NoiseRow&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
};

ALUM_END
