// A vector of short rows, turned so that column v of every row lies in one vector: short rows are computed a vector of
// rows at a time, and read and written a vector of neighbouring elements at a time.
#pragma once

#include "cpu/simd.h"

ALUM_BEGIN

template <int kMost>
class Tile {
 public:
  explicit Tile(int columns) : columns_(columns) {
    for (int k = 0; k < columns * kWidth; ++k) {
      to_rows_[k] = k % columns * kWidth + k / columns;
      to_columns_[k] = k % kWidth * columns + k / kWidth;
    }
  }

  Vec* columns() { return column_; }
  const Vec& operator[](int v) const { return column_[v]; }

  // Rows [0, count) from neighbouring elements; the rows beyond are zero.
  template <class T>
  void read(const T* from, int count) {
    const int64_t elements = static_cast<int64_t>(count) * columns_;
    for (int64_t k = 0; k < columns_ * kWidth; k += kWidth) {
      const int64_t left = elements - k;
      store(flat_ + k, left >= kWidth ? load(from + k) : left > 0 ? load_partial(from + k, left, Vec{}) : Vec{});
    }
    turn_in();
  }

  // Row r from from(r), for rows that lie anywhere.
  template <class T, class From>
  void read_rows(const From& from, int count) {
    for (int64_t k = 0; k < columns_ * kWidth; ++k) flat_[k] = 0.0f;
    for (int r = 0; r < count; ++r) {
      const T* row = from(r);
      for (int v = 0; v < columns_; ++v) flat_[r * columns_ + v] = widen(row[v]);
    }
    turn_in();
  }

  // Rows [0, count) to neighbouring elements.
  template <class T>
  void write(T* to, int count) {
    const int64_t elements = static_cast<int64_t>(count) * columns_;
    const float* turned = reinterpret_cast<const float*>(column_);
    for (int64_t k = 0; k < elements; k += kWidth) {
      const Vec x = gather(turned, load_bytes<IntVec>(to_rows_ + k));
      store_some(to + k, x, elements - k < kWidth ? elements - k : kWidth);
    }
  }

 private:
  void turn_in() {
    for (int v = 0; v < columns_; ++v) column_[v] = gather(flat_, load_bytes<IntVec>(to_columns_ + v * kWidth));
  }

  const int columns_;
  alignas(64) Vec column_[kMost];
  alignas(64) float flat_[kMost * kWidth];
  alignas(64) int32_t to_rows_[kMost * kWidth];
  alignas(64) int32_t to_columns_[kMost * kWidth];
};

ALUM_END
