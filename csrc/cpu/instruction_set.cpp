// The CPU kernels for one instruction set; the build compiles this file once for each, with its flags and its name in
// ALUM_ISA.
#include "cpu/kernels.h"
#include "cpu/linear_symmetric_kl.h"
#include "cpu/noise_init.h"
#include "cpu/projected_ascent.h"
#include "cpu/symmetric_kl.h"

#define ALUM_JOIN_(x, y) x##y
#define ALUM_JOIN(x, y) ALUM_JOIN_(x, y)
#define ALUM_TEXT_(x) #x
#define ALUM_TEXT(x) ALUM_TEXT_(x)

namespace alum::cpu {
namespace {

template <class Call>
void with_type(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat32:
      return call(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return call(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return call(static_cast<Float16*>(nullptr));
  }
}

// call(T*, G*): the gradient is fp32 or of the embeddings' type.
template <class Call>
void with_types(const AscentArguments& args, const Call& call) {
  with_type(args.dtype, [&](auto* like) {
    if (args.grad_dtype == Dtype::kFloat32) {
      call(like, static_cast<float*>(nullptr));
    } else {
      call(like, like);
    }
  });
}

template <class T>
using Pointee = std::remove_pointer_t<T>;

void noise_init(const NoiseArguments& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* like) { noise_init_tokens<Pointee<decltype(like)>>(args, begin, end); });
}

void projected_ascent(const AscentArguments& args, int64_t begin, int64_t end) {
  with_types(args, [&](auto* like, auto* grad_like) {
    ascent_tokens<Pointee<decltype(like)>, Pointee<decltype(grad_like)>>(args, begin, end);
  });
}

void ascent_phase(const AscentArguments& args, Phase phase, const GroupNorms* groups, TokenPartial* partials,
                  int64_t begin, int64_t end) {
  with_types(args, [&](auto* like, auto* grad_like) {
    ascent_phase_tokens<Pointee<decltype(like)>, Pointee<decltype(grad_like)>>(args, phase, groups, partials, begin,
                                                                               end);
  });
}

void divergence_loss(const DivergenceArguments& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* like) {
    using T = Pointee<decltype(like)>;
    args.columns <= kExactColumns ? divergence_loss_tiles<T>(args, begin, end)
                                  : divergence_loss_rows<T>(args, begin, end);
  });
}

void divergence_gradient(const DivergenceArguments& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* like) {
    using T = Pointee<decltype(like)>;
    args.columns <= kExactColumns ? divergence_gradient_tiles<T>(args, begin, end)
                                  : divergence_gradient_rows<T>(args, begin, end);
  });
}

void divergence_loss_and_gradient(const DivergenceArguments& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto* like) {
    using T = Pointee<decltype(like)>;
    args.columns <= kExactColumns ? divergence_loss_and_gradient_tiles<T>(args, begin, end)
                                  : divergence_loss_and_gradient_rows<T>(args, begin, end);
  });
}

void linear_divergence(const DivergenceArguments& args, int64_t begin, int64_t end) {
  args.differences ? linear_divergence_rows<RowForm::kBiasedDifferences>(args, begin, end)
                   : linear_divergence_rows<RowForm::kBiasedLogits>(args, begin, end);
}

}  // namespace

extern const Kernels ALUM_JOIN(kernels_, ALUM_ISA);
const Kernels ALUM_JOIN(kernels_, ALUM_ISA) = {
    ALUM_TEXT(ALUM_ISA),
    noise_init,
    projected_ascent,
    ascent_phase,
    divergence_loss,
    divergence_gradient,
    divergence_loss_and_gradient,
    linear_divergence,
};

}  // namespace alum::cpu
