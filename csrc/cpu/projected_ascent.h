// embeds + Pi(delta + step normalise(g)) on the CPU: tokens apart, features in vectors.
//
//   reads  embeds, grad (B, S, H) fp32/bf16/fp16, delta (B, S, H) fp32 or the seed, mask (B, S)
//   writes embeds + delta'' (B, S, H), delta'' (B, S, H) fp32 and statistics (B, S, 4) fp32 if asked for
//
// At token level a token runs through all phases at once, its rows in cache. At sequence and batch level each phase is a
// loop over all tokens, whose partials are combined in a fixed order in between.
#pragma once

#include "core/ascent.h"
#include "cpu/token_noise.h"

ALUM_BEGIN

ALUM_INLINE IntVec is_irregular(Vec g) { return ~(absolute(g) < broadcast<Vec>(__builtin_inff())); }

ALUM_INLINE float count_lanes(IntVec minus_count) {
  float count = 0.0f;
  for (int i = 0; i < kWidth; ++i) count -= static_cast<float>(minus_count[i]);
  return count;
}

// One token of an ascent: T is the type of the embeddings, G that of the gradient. Holds copies, so that the compiler
// knows that what it stores changes none of them.
template <class T, class G>
class AscentToken {
 public:
  // `noise` receives delta_0 where it is drawn.
  AscentToken(const AscentArguments& args, int64_t token, float* noise)
      : hidden_(args.shape.hidden),
        batch_(token / args.shape.length),
        position_(token % args.shape.length),
        kept_(args.mask.keeps(batch_, position_)),
        step_(args.step_size.at(batch_, position_)),
        epsilon_(args.epsilon.at(batch_, position_)),
        norm_(args.norm),
        normalize_(args.normalize),
        embeds_(static_cast<const T*>(args.embeds) + token * hidden_),
        grad_(static_cast<const G*>(args.grad) + token * hidden_),
        delta_(args.delta == nullptr ? noise : args.delta + token * hidden_),
        perturbed_(static_cast<T*>(args.perturbed) + token * hidden_),
        new_delta_(args.new_delta == nullptr ? nullptr : args.new_delta + token * hidden_),
        statistics_(args.statistics == nullptr ? nullptr : args.statistics + token * kAscentStatistics) {
    if (args.delta == nullptr && kept_) {
      draw_row(args.noise, args.noise.std.at(batch_, position_), batch_, position_, hidden_, noise);
    }
  }

  bool kept() const { return kept_; }
  int64_t batch() const { return batch_; }

  TokenPartial reduce(Phase phase, const GroupNorms& known) const {
    const GroupNorms group = known;
    Vec total{};
    IntVec irregular{};
    const auto add = [&](Vec x) ALUM_LAMBDA {
      const Vec term = phase_term(phase, x, group);
      total = is_sum(phase) ? total + term : larger_of(term, total);
    };
    if (phase == Phase::kGradLargest || phase == Phase::kGradLength) {
      for (int64_t h = 0; h < hidden_; h += kWidth) {
        const Vec g = load_some(grad_ + h, hidden_ - h < kWidth ? hidden_ - h : kWidth);
        add(g);
        irregular += is_irregular(g);
      }
    } else {
      with_normalize(normalize_, [&](auto normalize) ALUM_LAMBDA {
        each([&](int64_t, int64_t, Vec delta, Vec g)
                 ALUM_LAMBDA { add(moved(normalize, delta, g, step_, group)); });
      });
    }
    return {is_sum(phase) ? sum_lanes(total) : max_lanes(total), count_lanes(irregular)};
  }

  void write(const GroupNorms& known) const {
    const GroupNorms group = known;
    with_normalize(normalize_, [&](auto normalize) ALUM_LAMBDA {
      with_norm(norm_, [&](auto norm) ALUM_LAMBDA {
        each([&](int64_t h, auto count, Vec delta, Vec g) ALUM_LAMBDA {
          const Vec free = moved(normalize, delta, g, step_, group);
          put(h, count, projected(norm, free, epsilon_, group));
        });
      });
    });
    if (statistics_ != nullptr) write_statistics(group);
  }

  // Where no norm is needed but the knowledge that the gradient is finite: one sweep that assumes it and looks. A
  // gradient that was not is answered by a second sweep.
  bool write_assuming_finite() const {
    GroupNorms group;
    group.climbs = true;
    Vec largest{};
    IntVec irregular{};
    const auto sweep = [&](auto normalize, auto norm) ALUM_LAMBDA {
      each([&](int64_t h, auto count, Vec delta, Vec g) ALUM_LAMBDA {
        irregular |= is_irregular(g);
        largest = larger_of(absolute(g), largest);
        const Vec free = moved(normalize, delta, g, step_, group);
        put(h, count, projected(norm, free, epsilon_, group));
      });
    };
    const auto with_projection = [&](auto normalize) ALUM_LAMBDA {
      if (norm_ == Norm::kLinf) {
        sweep(normalize, std::integral_constant<Norm, Norm::kLinf>{});
      } else {
        sweep(normalize, std::integral_constant<Norm, Norm::kNone>{});
      }
    };
    if (normalize_ == Normalize::kSign) {
      with_projection(std::integral_constant<Normalize, Normalize::kSign>{});
    } else {
      with_projection(std::integral_constant<Normalize, Normalize::kNone>{});
    }
    group.climbs = group_climbs(max_lanes(largest), !any_lane(irregular));
    if (group.climbs && statistics_ != nullptr) write_statistics(group);
    return group.climbs;
  }

  void pass_through() const {
    std::memcpy(perturbed_, embeds_, static_cast<size_t>(hidden_) * sizeof(T));
    if (new_delta_ != nullptr) std::memset(new_delta_, 0, static_cast<size_t>(hidden_) * sizeof(float));
    if (statistics_ != nullptr) std::memset(statistics_, 0, kAscentStatistics * sizeof(float));
  }

 private:
  // body(h, count, delta, g) for every vector of features.
  template <class Body>
  ALUM_INLINE void each(const Body& body) const {
    const G* const grad = grad_;
    for_each_vector(delta_, hidden_, [&](int64_t h, auto count, Vec delta)
                                         ALUM_LAMBDA { body(h, count, delta, load_some(grad + h, count)); });
  }

  template <class Count>
  ALUM_INLINE void put(int64_t h, Count count, Vec bound) const {
    store_some(perturbed_ + h, load_some(embeds_ + h, count) + bound, count);
    if (new_delta_ != nullptr) store_some(new_delta_ + h, bound, count);
  }

  // A sweep of its own, over rows that lie in cache, its choices made at run time: most calls want no statistics.
  ALUM_NOINLINE void write_statistics(const GroupNorms& known) const {
    const GroupNorms group = known;
    Vec squares{};
    IntVec clipped{}, lost{}, irregular{};
    each([&](int64_t h, auto count, Vec delta, Vec g) ALUM_LAMBDA {
      Vec free = delta, bound = delta;
      with_normalize(normalize_, [&](auto normalize)
                                     ALUM_LAMBDA { free = moved(normalize, delta, g, step_, group); });
      with_norm(norm_, [&](auto norm) ALUM_LAMBDA { bound = projected(norm, free, epsilon_, group); });
      const Vec e = load_some(embeds_ + h, count);
      squares += bound * bound;
      clipped += bound != free;
      lost += (rounded_to(embeds_, e + bound) == e) & (bound != Vec{});
      irregular += is_irregular(g);
    });
    statistics_[0] = sum_lanes(squares);
    statistics_[1] = count_lanes(clipped);
    statistics_[2] = count_lanes(lost);
    statistics_[3] = count_lanes(irregular);
  }

  const int64_t hidden_, batch_, position_;
  const bool kept_;
  const float step_, epsilon_;
  const Norm norm_;
  const Normalize normalize_;
  const T* const embeds_;
  const G* const grad_;
  const float* const delta_;
  T* const perturbed_;
  float* const new_delta_;
  float* const statistics_;
};

template <class T, class G>
void ascent_tokens(const AscentArguments& args, int64_t begin, int64_t end) {
  const PhaseList list = reductions(args.normalize, args.norm);
  const bool normless = list.count == 1 && args.normalize != Normalize::kLinf;
  const NoiseRow noise(args.delta == nullptr ? args.shape.hidden : 0);
  for (int64_t token = begin; token < end; ++token) {
    const AscentToken<T, G> row(args, token, noise.data());
    if (!row.kept()) {
      row.pass_through();
      continue;
    }
    if (normless && row.write_assuming_finite()) continue;
    GroupNorms group;
    for (int i = 0; i < list.count; ++i) {
      const TokenPartial partial = row.reduce(list[i], group);
      absorb(group, list[i], partial.value, partial.non_finite == 0.0f);
    }
    row.write(group);
  }
}

// One phase over tokens of larger groups; masked tokens contribute zero.
template <class T, class G>
void ascent_phase_tokens(const AscentArguments& args, Phase phase, const GroupNorms* groups, TokenPartial* partials,
                         int64_t begin, int64_t end) {
  const NoiseRow noise(args.delta == nullptr ? args.shape.hidden : 0);
  for (int64_t token = begin; token < end; ++token) {
    const AscentToken<T, G> row(args, token, noise.data());
    const GroupNorms& group = groups[args.level == Level::kBatch ? 0 : row.batch()];
    if (phase != Phase::kWrite) {
      partials[token] = row.kept() ? row.reduce(phase, group) : TokenPartial{0.0f, 0.0f};
    } else if (row.kept()) {
      row.write(group);
    } else {
      row.pass_through();
    }
  }
}

ALUM_END
