// The projected ascent step, element by element: delta'' = Pi(delta + step normalise(g)).
//
// Norms are taken per group (token, sequence or batch) in phases, each a reduction over the group's unmasked elements
// that needs the results of those before it; the last one writes. See Phase in core/arguments.h.
#pragma once

#include <type_traits>

#include "core/arguments.h"
#include "core/elementary.h"
#include "core/lane.h"

ALUM_BEGIN

constexpr float kSmallestNormal = 1.17549435e-38f;  // 2^-126
constexpr float kRescaleFloor = 1e-6f;
constexpr int kAscentStatistics = 4;

// A group whose gradient is zero or holds a non-finite element takes no step, but is projected.
ALUM_INLINE bool group_climbs(float grad_largest, bool finite) { return finite && grad_largest >= kSmallestNormal; }

template <class F>
ALUM_INLINE F sign_of(F x) {
  const F one = broadcast<F>(1.0f);
  return x > 0.0f ? one : (x < 0.0f ? -one : F{});
}

template <class F>
ALUM_INLINE F moved(Normalize normalize, F delta, F g, float step, const GroupNorms& group) {
  if (!group.climbs) return delta;
  F direction = g;
  if (normalize == Normalize::kSign) direction = sign_of(g);
  if (normalize == Normalize::kLinf) direction = g / broadcast<F>(group.grad_largest);
  if (normalize == Normalize::kL2) direction = (g * group.grad_scale) / broadcast<F>(group.grad_length);
  return delta + step * direction;
}

// NaN stays NaN, and a radius that is NaN makes it.
template <class F>
ALUM_INLINE F projected(Norm norm, F x, float epsilon, const GroupNorms& group) {
  if (norm == Norm::kLinf) {
    const F high = broadcast<F>(epsilon), low = broadcast<F>(-epsilon);
    return x <= high ? (x < low ? low : x) : (x == x ? high : x);
  }
  if (norm == Norm::kL2) {
    const bool outside = group.moved_length > epsilon || epsilon != epsilon;
    return outside ? x * (epsilon / group.moved_length) : x;
  }
  if (norm == Norm::kLinfRescale) return x / broadcast<F>(group.moved_largest + kRescaleFloor);
  return x;
}

// Calls run(constant) with the run-time choice as a compile-time one.
template <class Run>
ALUM_HOST_INLINE void with_normalize(Normalize normalize, const Run& run) {
  switch (normalize) {
    case Normalize::kNone:
      return run(std::integral_constant<Normalize, Normalize::kNone>{});
    case Normalize::kLinf:
      return run(std::integral_constant<Normalize, Normalize::kLinf>{});
    case Normalize::kL2:
      return run(std::integral_constant<Normalize, Normalize::kL2>{});
    case Normalize::kSign:
      return run(std::integral_constant<Normalize, Normalize::kSign>{});
  }
}

template <class Run>
ALUM_HOST_INLINE void with_norm(Norm norm, const Run& run) {
  switch (norm) {
    case Norm::kLinf:
      return run(std::integral_constant<Norm, Norm::kLinf>{});
    case Norm::kL2:
      return run(std::integral_constant<Norm, Norm::kL2>{});
    case Norm::kLinfRescale:
      return run(std::integral_constant<Norm, Norm::kLinfRescale>{});
    case Norm::kNone:
      return run(std::integral_constant<Norm, Norm::kNone>{});
  }
}

template <class Run>
ALUM_HOST_INLINE void with_reduction(Phase phase, const Run& run) {
  switch (phase) {
    case Phase::kGradLargest:
      return run(std::integral_constant<Phase, Phase::kGradLargest>{});
    case Phase::kGradLength:
      return run(std::integral_constant<Phase, Phase::kGradLength>{});
    case Phase::kMovedLargest:
      return run(std::integral_constant<Phase, Phase::kMovedLargest>{});
    case Phase::kMovedLength:
      return run(std::integral_constant<Phase, Phase::kMovedLength>{});
    case Phase::kWrite:
      return;
  }
}

// The reductions that a choice of normalisation and projection needs, in order; kWrite follows. Four bits each, since a
// GPU register cannot be indexed.
struct PhaseList {
  uint32_t packed = 0;
  int count = 0;

  ALUM_INLINE void add(Phase phase) { packed |= static_cast<uint32_t>(phase) << (4 * count++); }
  ALUM_INLINE Phase operator[](int i) const { return static_cast<Phase>((packed >> (4 * i)) & 15u); }
};

ALUM_INLINE PhaseList reductions(Normalize normalize, Norm norm) {
  PhaseList list;
  list.add(Phase::kGradLargest);
  if (normalize == Normalize::kL2) list.add(Phase::kGradLength);
  if (norm == Norm::kL2 || norm == Norm::kLinfRescale) list.add(Phase::kMovedLargest);
  if (norm == Norm::kL2) list.add(Phase::kMovedLength);
  return list;
}

// Whether a phase looks at delta, and not at the gradient alone.
ALUM_INLINE bool needs_delta(Phase phase) { return phase != Phase::kGradLargest && phase != Phase::kGradLength; }

ALUM_INLINE bool is_sum(Phase phase) { return phase == Phase::kGradLength || phase == Phase::kMovedLength; }

// A power of two that brings numbers of up to `largest` near 1; products with it are exact.
ALUM_INLINE float scale_for(float largest) {
  const int32_t exponent = (bits_as<int32_t>(largest) >> 23) & 255, inverse = 253 - exponent;
  return bits_as<float>((inverse < 1 ? 1 : inverse) << 23);
}

// Enter the result of a phase over the whole group.
ALUM_INLINE void absorb(GroupNorms& group, Phase phase, float value, bool finite) {
  switch (phase) {
    case Phase::kGradLargest:
      group.grad_largest = value;
      group.grad_scale = scale_for(value);
      group.climbs = group_climbs(value, finite);
      break;
    case Phase::kGradLength:
      group.grad_length = square_root(value);
      break;
    case Phase::kMovedLargest:
      group.moved_largest = value;
      group.moved_scale = scale_for(value);
      break;
    case Phase::kMovedLength:
      group.moved_length = square_root(value) / group.moved_scale;
      break;
    case Phase::kWrite:
      break;
  }
}

// What x (g, or delta' in the phases named after it) adds to a phase; for kGradLargest only finite g count.
template <class F>
ALUM_INLINE F phase_term(Phase phase, F x, const GroupNorms& group) {
  if (phase == Phase::kGradLargest) {
    const F size = absolute(x);
    return size < broadcast<F>(__builtin_inff()) ? size : F{};
  }
  if (phase == Phase::kMovedLargest) return absolute(x);
  const F scaled = x * (phase == Phase::kGradLength ? group.grad_scale : group.moved_scale);
  return scaled * scaled;
}

ALUM_END
