// The CPU kernels of one instruction set: each works on a range of tokens or rows and is called from many threads.
#pragma once

#include "core/arguments.h"

namespace alum::cpu {

struct Kernels {
  const char* name;
  // Tokens [begin, end) of a (B, S, H) tensor.
  void (*noise_init)(const NoiseArguments&, int64_t begin, int64_t end);
  void (*projected_ascent)(const AscentArguments&, int64_t begin, int64_t end);
  // The same at sequence and batch level, one phase at a time; groups holds what is known of each sequence, or of the batch.
  void (*ascent_phase)(const AscentArguments&, Phase phase, const GroupNorms* groups, TokenPartial* partials,
                       int64_t begin, int64_t end);
  // Rows [begin, end) of (N, V) logits.
  void (*divergence_loss)(const DivergenceArguments&, int64_t begin, int64_t end);
  void (*divergence_gradient)(const DivergenceArguments&, int64_t begin, int64_t end);
  void (*divergence_loss_and_gradient)(const DivergenceArguments&, int64_t begin, int64_t end);
  void (*linear_divergence)(const DivergenceArguments&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The widest set that this machine has, or the one that ALUM_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace alum::cpu
