// embeds + Pi(delta + step normalise(g)) on the CPU: tokens apart, features in vectors.
//
//   reads  embeds, grad (B, S, H) fp32/bf16/fp16, delta (B, S, H) fp32 or the seed, mask (B, S)
//   writes embeds + delta'' (B, S, H), delta'' (B, S, H) fp32 and statistics (B, S, 4) fp32 if asked for
//
// At token level a token runs through all phases at once, its rows in cache. At sequence and batch level each phase is
// a loop over all tokens, whose partials are combined in a fixed order in between, and an output keeps the noise from
// the first phase that needs it to the last.
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
  // `delta` is the token's row, given or drawn.
  AscentToken(const AscentArguments& args, int64_t token, const float* delta)
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
        delta_(delta),
        perturbed_(static_cast<T*>(args.perturbed) + token * hidden_),
        new_delta_(args.new_delta == nullptr ? nullptr : args.new_delta + token * hidden_),
        statistics_(args.statistics == nullptr ? nullptr : args.statistics + token * kAscentStatistics) {}

  bool kept() const { return kept_; }
  int64_t batch() const { return batch_; }

  TokenPartial reduce(Phase phase, const GroupNorms& known) const {
    TokenPartial partial{0.0f, 0.0f};
    with_reduction(phase, [&](auto which) ALUM_LAMBDA { partial = reduce_in<decltype(which)::value>(known); });
    return partial;
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
  template <Phase kPhase>
  ALUM_INLINE TokenPartial reduce_in(const GroupNorms& known) const {
    const GroupNorms group = known;
    IntVec irregular{};
    if constexpr (kPhase == Phase::kGradLargest || kPhase == Phase::kGradLength) {
      const float value = reduced<kPhase>(group, [&](int64_t begin, int64_t end, const auto& add) ALUM_LAMBDA {
        for_each_vector(grad_, begin, end, [&](int64_t, auto, Vec g) ALUM_LAMBDA {
          add(g);
          if (kPhase == Phase::kGradLargest) irregular += is_irregular(g);
        });
      });
      return {value, count_lanes(irregular)};
    } else {
      float value = 0.0f;
      with_normalize(normalize_, [&](auto normalize) ALUM_LAMBDA {
        value = reduced<kPhase>(group, [&](int64_t begin, int64_t end, const auto& add) ALUM_LAMBDA {
          each(begin, end,
               [&](int64_t, auto, Vec delta, Vec g) ALUM_LAMBDA { add(moved(normalize, delta, g, step_, group)); });
        });
      });
      return {value, 0.0f};
    }
  }

  // The sum or the largest of the phase's terms; features(begin, end, add) adds those of a block.
  template <Phase kPhase, class Features>
  ALUM_INLINE float reduced(const GroupNorms& group, const Features& features) const {
    double total = 0.0;
    each_block([&](int64_t begin, int64_t end) ALUM_LAMBDA {
      Vec block{};
      features(begin, end, [&](Vec x) ALUM_LAMBDA {
        const Vec term = phase_term(kPhase, x, group);
        block = is_sum(kPhase) ? block + term : larger_of(term, block);
      });
      const double value = is_sum(kPhase) ? sum_lanes(block) : max_lanes(block);
      total = is_sum(kPhase) ? total + value : larger_of(value, total);
    });
    return static_cast<float>(total);
  }

  // body(begin, end) for every block of features within which sums are taken in fp32.
  template <class Body>
  ALUM_INLINE void each_block(const Body& body) const {
    constexpr int64_t kBlock = static_cast<int64_t>(kFold) * kWidth;
    for (int64_t begin = 0; begin < hidden_; begin += kBlock) {
      body(begin, begin + kBlock < hidden_ ? begin + kBlock : hidden_);
    }
  }

  // body(h, count, delta, g) for every vector of features [begin, end).
  template <class Body>
  ALUM_INLINE void each(int64_t begin, int64_t end, const Body& body) const {
    const G* const grad = grad_;
    for_each_vector(delta_, begin, end, [&](int64_t h, auto count, Vec delta) ALUM_LAMBDA {
      body(h, count, delta, load_some(grad + h, count));
    });
  }

  template <class Body>
  ALUM_INLINE void each(const Body& body) const {
    each(0, hidden_, body);
  }

  template <class Count>
  ALUM_INLINE void put(int64_t h, Count count, Vec bound) const {
    store_some(perturbed_ + h, load_some(embeds_ + h, count) + bound, count);
    if (new_delta_ != nullptr) store_some(new_delta_ + h, bound, count);
  }

  // A sweep of its own, over rows that lie in cache, its choices made at run time: most calls want no statistics.
  ALUM_NOINLINE void write_statistics(const GroupNorms& known) const {
    const GroupNorms group = known;
    double squares = 0.0;
    IntVec clipped{}, lost{}, irregular{};
    each_block([&](int64_t begin, int64_t end) ALUM_LAMBDA {
      Vec block{};
      each(begin, end, [&](int64_t h, auto count, Vec delta, Vec g) ALUM_LAMBDA {
        Vec free = delta, bound = delta;
        with_normalize(normalize_,
                       [&](auto normalize) ALUM_LAMBDA { free = moved(normalize, delta, g, step_, group); });
        with_norm(norm_, [&](auto norm) ALUM_LAMBDA { bound = projected(norm, free, epsilon_, group); });
        const Vec e = load_some(embeds_ + h, count);
        block += bound * bound;
        clipped += bound != free;
        lost += (rounded_to(embeds_, e + bound) == e) & (bound != Vec{});
        irregular += is_irregular(g);
      });
      squares += sum_lanes(block);
    });
    statistics_[0] = static_cast<float>(squares);
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

// The rows of delta: given, or drawn into `room`.
class DeltaRows {
 public:
  explicit DeltaRows(const AscentArguments& args) : args_(args), room_(args.delta == nullptr ? args.shape.hidden : 0) {}

  const float* operator[](int64_t token) const {
    if (args_.delta != nullptr) return args_.delta + token * args_.shape.hidden;
    const int64_t b = token / args_.shape.length, s = token % args_.shape.length;
    if (args_.mask.keeps(b, s)) draw_row(args_.noise, args_.noise.std.at(b, s), b, s, args_.shape.hidden, room_.data());
    return room_.data();
  }

 private:
  const AscentArguments& args_;
  const NoiseRow room_;
};

template <class T, class G>
void ascent_tokens(const AscentArguments& args, int64_t begin, int64_t end) {
  const PhaseList list = reductions(args.normalize, args.norm);
  const bool normless = list.count == 1 && args.normalize != Normalize::kLinf;
  const DeltaRows deltas(args);
  for (int64_t token = begin; token < end; ++token) {
    const AscentToken<T, G> row(args, token, deltas[token]);
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

// Where noise that one phase drew lies until the last one has read it: in an fp32 output that the last one writes, or
// nowhere.
template <class T>
float* kept_noise(const AscentArguments& args) {
  if (args.delta != nullptr) return nullptr;
  if (args.new_delta != nullptr) return args.new_delta;
  return std::is_same_v<T, float> ? static_cast<float*>(args.perturbed) : nullptr;
}

// One phase over tokens of larger groups; masked tokens contribute zero.
template <class T, class G>
void ascent_phase_tokens(const AscentArguments& args, Phase phase, const GroupNorms* groups, TokenPartial* partials,
                         int64_t begin, int64_t end) {
  float* const kept = kept_noise<T>(args);
  const bool keeps = kept != nullptr && phase == Phase::kMovedLargest;
  // statistics are a second sweep over what the last phase read
  const bool reads = kept != nullptr &&
                     (phase == Phase::kMovedLength || (phase == Phase::kWrite && args.statistics == nullptr &&
                                                       (args.norm == Norm::kL2 || args.norm == Norm::kLinfRescale)));
  const int64_t hidden = args.shape.hidden;
  const DeltaRows deltas(args);
  for (int64_t token = begin; token < end; ++token) {
    const float* delta = reads ? kept + token * hidden : needs_delta(phase) ? deltas[token] : nullptr;
    const AscentToken<T, G> row(args, token, delta);
    if (keeps && row.kept()) std::memcpy(kept + token * hidden, delta, static_cast<size_t>(hidden) * sizeof(float));
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
