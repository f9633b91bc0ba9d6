// embeds + delta_0 on the CPU: tokens apart, features in vectors.
//
//   reads  embeds (B, S, H) fp32/bf16/fp16, seed (1,) int64, mask (B, S)
//   writes embeds + delta_0 (B, S, H), delta_0 (B, S, H) fp32 if asked for
#pragma once

#include "cpu/token_noise.h"

ALUM_BEGIN

template <class T>
void noise_init_tokens(const NoiseArguments& args, int64_t begin, int64_t end) {
  const int64_t hidden = args.shape.hidden;
  const NoiseRow noise(hidden);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / args.shape.length, s = token % args.shape.length;
    const T* embeds = static_cast<const T*>(args.embeds) + token * hidden;
    T* perturbed = static_cast<T*>(args.perturbed) + token * hidden;
    float* delta = args.delta == nullptr ? nullptr : args.delta + token * hidden;
    if (!args.mask.keeps(b, s)) {
      std::memcpy(perturbed, embeds, static_cast<size_t>(hidden) * sizeof(T));
      if (delta != nullptr) std::memset(delta, 0, static_cast<size_t>(hidden) * sizeof(float));
      continue;
    }
    draw_row(args.noise, args.noise.std.at(b, s), b, s, hidden, noise.data());
    for_each_vector(noise.data(), hidden, [&](int64_t h, auto count, Vec d) ALUM_LAMBDA {
      store_some(perturbed + h, load_some(embeds + h, count) + d, count);
      if (delta != nullptr) store_some(delta + h, d, count);
    });
  }
}

ALUM_END
