// Plain descriptions of the tensors that a kernel reads and writes: filled once by ops.cpp, passed by value to CPU and
// CUDA kernels alike. They are the same types for every instruction set.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace alum {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Divergence : int { kSymmetricKl = 0, kKl = 1 };

// What of the gradient is wanted: kFull both true sides; kDetachTargets +-(p - q), each side's weights held constant;
// kDetachClean the true side of a alone (the caller asks for no db).
enum class Convention : int { kFull = 0, kDetachTargets = 1, kDetachClean = 2 };

enum class Norm : int { kLinf = 0, kL2 = 1, kLinfRescale = 2, kNone = 3 };
enum class Normalize : int { kNone = 0, kLinf = 1, kL2 = 2, kSign = 3 };
enum class Level : int { kToken = 0, kSequence = 1, kBatch = 2 };

// The phases of a projected ascent, in order.
enum class Phase : int {
  kGradLargest = 0,   // max|g|, and how many g are not finite
  kGradLength = 1,    // sum (s g)^2, s a power of two near 1 / max|g|: no square under- or overflows
  kMovedLargest = 2,  // max|delta'|, delta' = delta + step normalise(g)
  kMovedLength = 3,   // sum (s delta')^2, likewise
  kWrite = 4,
};

// What the phases found out about a group.
struct GroupNorms {
  float grad_largest = 0.0f;
  float grad_scale = 1.0f;   // s of kGradLength
  float grad_length = 1.0f;  // ||s g||
  bool climbs = false;       // a zero or non-finite gradient takes no step, but is projected
  float moved_largest = 0.0f;
  float moved_scale = 1.0f;
  float moved_length = 0.0f;  // ||delta'||
};

// What one token contributes to a phase: a largest absolute value or a sum of squares, and how many g are not finite.
struct TokenPartial {
  float value;
  float non_finite;
};

// A magnitude that is one number, or one for each token of a (B, S) view (strides may be zero).
struct PerToken {
  const float* data = nullptr;
  int64_t stride_batch = 0, stride_length = 0;
  float value = 0.0f;

  ALUM_INLINE float at(int64_t b, int64_t s) const {
    return data == nullptr ? value : data[b * stride_batch + s * stride_length];
  }
};

// bool or integer 0 and 1 of any width: the lowest byte of a little-endian integer tells. Strides in bytes.
struct TokenMask {
  const uint8_t* data = nullptr;
  int64_t stride_batch = 0, stride_length = 0;

  ALUM_INLINE bool keeps(int64_t b, int64_t s) const {
    return data == nullptr || data[b * stride_batch + s * stride_length] != 0;
  }
};

struct NoiseSource {
  const int64_t* seed = nullptr;
  PerToken std;
  bool normal = true;
  uint32_t stream = 0;
  int64_t sample_offset = 0;
};

// Shapes of (B, S, H) tensors; embeds, grad, delta and outputs are contiguous.
struct TokenShape {
  int64_t batch = 0, length = 0, hidden = 0;

  ALUM_INLINE int64_t tokens() const { return batch * length; }
};

struct NoiseArguments {
  const void* embeds = nullptr;
  void* perturbed = nullptr;
  float* delta = nullptr;  // or null
  TokenShape shape;
  Dtype dtype = Dtype::kFloat32;
  NoiseSource noise;
  TokenMask mask;
};

struct AscentArguments {
  const void* embeds = nullptr;
  const void* grad = nullptr;
  const float* delta = nullptr;  // or null: delta_0 is drawn again
  void* perturbed = nullptr;
  float* new_delta = nullptr;   // or null
  float* statistics = nullptr;  // (B, S, 4) or null
  void* scratch = nullptr;      // cuda::ascent_scratch_bytes, on CUDA
  TokenShape shape;
  Dtype dtype = Dtype::kFloat32, grad_dtype = Dtype::kFloat32;
  NoiseSource noise;
  PerToken step_size, epsilon;
  TokenMask mask;
  Norm norm = Norm::kLinf;
  Normalize normalize = Normalize::kNone;
  Level level = Level::kToken;
};

// Rows n = o I + i of a tensor whose leading dimensions are (O, I). 64-bit: N V exceeds 2^31 in practice. Where O is 1,
// as for any tensor whose rows are evenly apart, nothing is divided.
struct RowStrides {
  int64_t inner = 1, outer_step = 0, inner_step = 0;

  // Of leading dimensions (outer, inner) with these strides; rows that are evenly apart count as O = 1.
  static RowStrides of(int64_t outer, int64_t inner, int64_t stride_outer, int64_t stride_inner) {
    if (outer == 1 || stride_outer == inner * stride_inner) return {outer * inner, 0, stride_inner};
    if (inner == 1) return {outer, 0, stride_outer};
    return {inner, stride_outer, stride_inner};
  }

  ALUM_INLINE int64_t offset(int64_t n) const {
    return n < inner ? n * inner_step : (n / inner) * outer_step + (n % inner) * inner_step;
  }
};

// (O, I, V) logits with neighbouring columns.
struct LogitRows {
  const void* data = nullptr;
  RowStrides strides;
};

// (O, I) fp32.
struct RowVector {
  const float* data = nullptr;
  RowStrides strides;

  ALUM_INLINE float at(int64_t n) const { return data[strides.offset(n)]; }
};

struct DivergenceArguments {
  LogitRows a, b;
  int64_t rows = 0, columns = 0;
  Dtype dtype = Dtype::kFloat32;
  Dtype grad_dtype = Dtype::kFloat32;  // of the outputs of the linear divergence; the others write `dtype`
  // Of the linear divergence: whether `a` holds a - b, and what is added to both sides' logits.
  bool differences = false;
  const float* bias = nullptr;  // (V,) or null
  RowVector row_weight;         // data null: every row counts fully; rows of weight zero are skipped
  RowVector grad_rows;          // upstream gradient of each row, for the gradient kernel
  float* loss = nullptr;        // (N,)
  float* statistics = nullptr;  // (5, N), written by the loss, read by the gradient
  void* grad_a = nullptr;       // (N, V) contiguous, or null
  void* grad_b = nullptr;
  void* grad_sum = nullptr;  // da + db, formed without cancellation; of the linear divergence
  float inv_temperature = 1.0f;
  float grad_scale = 1.0f;  // of the kernel that gives loss and gradient
  Divergence divergence = Divergence::kSymmetricKl;
  Convention convention = Convention::kFull;

  // Weight of a row in the loss: rows of weight zero are not looked at.
  ALUM_INLINE float weight_of(int64_t n) const { return row_weight.data == nullptr ? 1.0f : row_weight.at(n); }
};

}  // namespace alum
