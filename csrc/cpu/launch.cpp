#include "cpu/launch.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/ascent.h"
#include "core/divergence.h"
#include "cpu/kernels.h"

namespace alum::cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

bool supported(const Kernels& candidate) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&candidate == &kernels_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&candidate == &kernels_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return &candidate == &kernels_baseline;
}

const Kernels& choose_kernels() {
  const Kernels* const widest_first[] = {
#if defined(__x86_64__)
      &kernels_avx512,
      &kernels_avx2,
#endif
      &kernels_baseline,
  };
  const char* const wanted = std::getenv("ALUM_CPU_CAPABILITY");
  for (const Kernels* candidate : widest_first) {
    const bool named = wanted != nullptr && std::strcmp(candidate->name, wanted) == 0;
    if (named && !supported(*candidate)) {
      throw std::runtime_error(std::string("ALUM_CPU_CAPABILITY: this processor has no ") + wanted);
    }
    if (named || (wanted == nullptr && supported(*candidate))) return *candidate;
  }
  throw std::runtime_error(std::string("ALUM_CPU_CAPABILITY: expected baseline, avx2 or avx512, got ") + wanted);
}

// Small rows are worked on a vector at a time: threads take whole vectors.
int64_t row_unit(int64_t columns) { return columns <= kExactColumns ? kExactColumns : 1; }

// Threads take whole groups of `unit` items.
template <class Body>
void spread(int64_t items, int64_t elements_per_item, int64_t unit, const Body& body) {
  const int64_t units = (items + unit - 1) / unit;
  const int64_t per_unit = elements_per_item * unit > 0 ? elements_per_item * unit : 1;
  const int64_t grain = kElementsPerTask / per_unit > 0 ? kElementsPerTask / per_unit : 1;
  kernels();  // an error in choosing them is raised here, where its text survives
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = end * unit < items ? end * unit : items;
    body(begin * unit, last);
  });
}

// Phases over tokens with partials in between, combined in the order of the tokens whatever the number of threads.
void ascend_groups(const AscentArguments& args) {
  const int64_t tokens = args.shape.tokens();
  const int64_t groups = args.level == Level::kBatch ? 1 : args.shape.batch;
  const int64_t per_group = args.level == Level::kBatch ? tokens : args.shape.length;
  std::vector<GroupNorms> norms(static_cast<size_t>(groups));
  std::vector<TokenPartial> partials(static_cast<size_t>(tokens));
  const auto run = [&](Phase phase) {
    spread(tokens, args.shape.hidden, 1, [&](int64_t begin, int64_t end) {
      kernels().ascent_phase(args, phase, norms.data(), partials.data(), begin, end);
    });
  };
  const PhaseList list = reductions(args.normalize, args.norm);
  for (int i = 0; i < list.count; ++i) {
    const Phase phase = list[i];
    run(phase);
    for (int64_t g = 0; g < groups; ++g) {
      double value = 0.0;
      bool finite = true;
      for (int64_t t = g * per_group; t < (g + 1) * per_group; ++t) {
        const TokenPartial& partial = partials[static_cast<size_t>(t)];
        value = is_sum(phase) ? value + partial.value : (partial.value > value ? partial.value : value);
        finite = finite && partial.non_finite == 0.0f;
      }
      absorb(norms[static_cast<size_t>(g)], phase, static_cast<float>(value), finite);
    }
  }
  run(Phase::kWrite);
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A large output is usually memory that the system has just promised: asking for huge pages before the first write
// spares a page fault for each 4 KiB, which costs more than the arithmetic (Linux; elsewhere, and where huge pages are
// off, nothing happens).
void expect_first_write(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kWorthwhile = 4 << 20;
  constexpr uintptr_t kPage = 4096;
  if (data == nullptr || bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure changes nothing
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

void expect_gradients(const DivergenceArguments& args) {
  const int64_t bytes = args.rows * args.columns * bytes_of(args.dtype);
  expect_first_write(args.grad_a, bytes);
  expect_first_write(args.grad_b, bytes);
}

void expect_perturbed(const TokenShape& shape, Dtype dtype, void* perturbed, float* delta) {
  const int64_t elements = shape.tokens() * shape.hidden;
  expect_first_write(perturbed, elements * bytes_of(dtype));
  expect_first_write(delta, elements * 4);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

const char* capability() { return kernels().name; }

void noise_init(const NoiseArguments& args) {
  expect_perturbed(args.shape, args.dtype, args.perturbed, args.delta);
  spread(args.shape.tokens(), args.shape.hidden, 1,
         [&](int64_t begin, int64_t end) { kernels().noise_init(args, begin, end); });
}

void projected_ascent(const AscentArguments& args) {
  expect_perturbed(args.shape, args.dtype, args.perturbed, args.new_delta);
  if (args.level != Level::kToken) return ascend_groups(args);
  spread(args.shape.tokens(), args.shape.hidden, 1,
         [&](int64_t begin, int64_t end) { kernels().projected_ascent(args, begin, end); });
}

void divergence_loss(const DivergenceArguments& args) {
  spread(args.rows, args.columns, row_unit(args.columns),
         [&](int64_t begin, int64_t end) { kernels().divergence_loss(args, begin, end); });
}

void divergence_gradient(const DivergenceArguments& args) {
  expect_gradients(args);
  spread(args.rows, args.columns, row_unit(args.columns),
         [&](int64_t begin, int64_t end) { kernels().divergence_gradient(args, begin, end); });
}

void divergence_loss_and_gradient(const DivergenceArguments& args) {
  expect_gradients(args);
  spread(args.rows, args.columns, row_unit(args.columns),
         [&](int64_t begin, int64_t end) { kernels().divergence_loss_and_gradient(args, begin, end); });
}

void linear_divergence(const DivergenceArguments& args) {
  spread(args.rows, args.columns, 1,
         [&](int64_t begin, int64_t end) { kernels().linear_divergence(args, begin, end); });
}

}  // namespace alum::cpu
