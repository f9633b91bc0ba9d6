// The projected ascent step, element by element: delta'' = Pi(delta + step normalise(g)).
//
// Norms are taken per group (token, sequence or batch) in phases, each a reduction over the group's unmasked elements
// that needs the results of those before it; the last one writes. See Phase in core/arguments.h.
#pragma once

#include <type_traits>

#include "core/arguments.h"
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

template <Normalize kNormalize, class F>
ALUM_INLINE F moved(F delta, F g, float step, const GroupNorms& group) {
  if (!group.climbs) return delta;
  F direction = g;
  if (kNormalize == Normalize::kSign) direction = sign_of(g);
  if (kNormalize == Normalize::kLinf) direction = g / broadcast<F>(group.grad_largest);
  if (kNormalize == Normalize::kL2) {
    direction = g / broadcast<F>(group.grad_largest) / broadcast<F>(group.grad_length);
  }
  return delta + step * direction;
}

// NaN stays NaN.
template <Norm kNorm, class F>
ALUM_INLINE F projected(F x, float epsilon, const GroupNorms& group) {
  if (kNorm == Norm::kLinf) {
    const F high = broadcast<F>(epsilon), low = broadcast<F>(-epsilon);
    return x > high ? high : (x < low ? low : x);
  }
  if (kNorm == Norm::kL2) return group.moved_length > epsilon ? x * (epsilon / group.moved_length) : x;
  if (kNorm == Norm::kLinfRescale) return x / broadcast<F>(group.moved_largest + kRescaleFloor);
  return x;
}

// Calls run(constant) with the run-time choice as a compile-time one.
template <class Run>
ALUM_INLINE void with_normalize(Normalize normalize, const Run& run) {
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
ALUM_INLINE void with_norm(Norm norm, const Run& run) {
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

// The reductions that a choice of normalisation and projection needs, in order; kWrite follows.
struct PhaseList {
  Phase phases[4];
  int count;
};

ALUM_INLINE PhaseList reductions(Normalize normalize, Norm norm) {
  PhaseList list{{Phase::kGradLargest}, 1};
  if (normalize == Normalize::kL2) list.phases[list.count++] = Phase::kGradLength;
  if (norm == Norm::kL2 || norm == Norm::kLinfRescale) list.phases[list.count++] = Phase::kMovedLargest;
  if (norm == Norm::kL2) list.phases[list.count++] = Phase::kMovedLength;
  return list;
}

ALUM_INLINE bool is_sum(Phase phase) { return phase == Phase::kGradLength || phase == Phase::kMovedLength; }

// Enter the result of a phase over the whole group.
ALUM_INLINE void absorb(GroupNorms& group, Phase phase, float value, bool finite) {
  switch (phase) {
    case Phase::kGradLargest:
      group.grad_largest = value;
      group.climbs = group_climbs(value, finite);
      break;
    case Phase::kGradLength:
      group.grad_length = square_root(value);
      break;
    case Phase::kMovedLargest:
      group.moved_largest = value;
      break;
    case Phase::kMovedLength:
      group.moved_length = group.moved_largest * square_root(value);
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
  const float scale = phase == Phase::kGradLength ? group.grad_largest : group.moved_largest;
  if (!(scale > 0.0f) || (phase == Phase::kGradLength && !group.climbs)) return F{};
  const F ratio = x / broadcast<F>(scale);
  return ratio * ratio;
}

ALUM_END
