// The native ops, registered through the LibTorch stable ABI: one binary serves every torch from 2.10 on.
//
// Outputs are allocated by the caller (alum_kernels/ops), so that the native and the Triton kernels share one place
// that allocates; an output of zero elements is one that nobody asked for. Arguments that a user can get wrong are
// checked there too; the checks here keep a direct call of these ops inside the tensors it was given.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/ascent.h"
#include "core/divergence.h"
#include "cpu/launch.h"
#include "cuda/launch.h"

namespace alum { namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, ": expected ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

void check_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": expected the device of the first tensor");
}

void check_contiguous(const Tensor& t, const Tensor& like, const char* name) {
  check_device(t, like, name);
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(t.numel() == like.numel(), name, ": expected ", like.numel(), " elements, got ", t.numel());
}

TokenShape token_shape(const Tensor& embeds) {
  STD_TORCH_CHECK(embeds.dim() == 3, "embeds: expected 3 dimensions (B, S, H), got ", embeds.dim());
  STD_TORCH_CHECK(embeds.is_contiguous(), "embeds: expected a contiguous tensor");
  return {embeds.size(0), embeds.size(1), embeds.size(2)};
}

void check_per_token(const Tensor& t, const Tensor& embeds, const char* name) {
  check_device(t, embeds, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == embeds.size(0) && t.size(1) == embeds.size(1), name,
                  ": expected shape (B, S)");
}

PerToken per_token(const std::optional<Tensor>& t, double value, const Tensor& embeds, const char* name) {
  if (!t.has_value()) return {nullptr, 0, 0, static_cast<float>(value)};
  check_type(*t, ScalarType::Float, name);
  check_per_token(*t, embeds, name);
  return {static_cast<const float*>(t->const_data_ptr()), t->stride(0), t->stride(1), 0.0f};
}

TokenMask token_mask(const std::optional<Tensor>& mask, const Tensor& embeds) {
  if (!mask.has_value()) return {};
  check_per_token(*mask, embeds, "mask");
  const int64_t bytes = static_cast<int64_t>(mask->element_size());
  return {static_cast<const uint8_t*>(mask->const_data_ptr()), mask->stride(0) * bytes, mask->stride(1) * bytes};
}

NoiseSource noise_source(const std::optional<Tensor>& seed, const std::optional<Tensor>& std_per_token, double std,
                         bool normal, int64_t stream, int64_t sample_offset, const Tensor& embeds) {
  NoiseSource noise;
  if (seed.has_value()) {
    check_type(*seed, ScalarType::Long, "seed");
    check_device(*seed, embeds, "seed");
    STD_TORCH_CHECK(seed->numel() == 1, "seed: expected one element, got ", seed->numel());
    noise.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  noise.std = per_token(std_per_token, std, embeds, "std");
  noise.normal = normal;
  noise.stream = static_cast<uint32_t>(stream);
  noise.sample_offset = sample_offset;
  return noise;
}

// An output of `count` elements, or null where it has none.
template <class T>
T* optional_output(const Tensor& t, const Tensor& like, int64_t count, const char* name) {
  if (t.numel() == 0) return nullptr;
  check_device(t, like, name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count, name, ": expected ", count, " contiguous elements");
  return static_cast<T*>(t.mutable_data_ptr());
}

// Runs `cpu(args)` or `cuda(args, stream)`, whichever the tensor asks for.
template <class Args>
void launch(const Args& args, const Tensor& on, void (*on_cpu)(const Args&), void (*on_cuda)(const Args&, void*)) {
  if (on.is_cpu()) return on_cpu(args);
  STD_TORCH_CHECK(on.is_cuda(), "alum_kernels: the native kernels serve cpu and cuda tensors");
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  on_cuda(args, cuda::current_stream(on.get_device_index()));
}

void noise_init(const Tensor& embeds, const Tensor& seed, const std::optional<Tensor>& std_per_token, double std,
                const std::optional<Tensor>& mask, const Tensor& perturbed, const Tensor& delta, bool normal,
                int64_t stream, int64_t sample_offset) {
  NoiseArguments args;
  args.shape = token_shape(embeds);
  args.dtype = dtype_of(embeds, "embeds");
  check_type(perturbed, embeds.scalar_type(), "perturbed");
  check_contiguous(perturbed, embeds, "perturbed");
  check_type(delta, ScalarType::Float, "delta");
  args.embeds = embeds.const_data_ptr();
  args.perturbed = perturbed.mutable_data_ptr();
  args.delta = optional_output<float>(delta, embeds, embeds.numel(), "delta");
  args.noise = noise_source(seed, std_per_token, std, normal, stream, sample_offset, embeds);
  args.mask = token_mask(mask, embeds);
  if (embeds.numel() > 0) launch(args, embeds, cpu::noise_init, cuda::noise_init);
}

void projected_ascent(const Tensor& embeds, const Tensor& grad, const std::optional<Tensor>& delta,
                      const std::optional<Tensor>& seed, const std::optional<Tensor>& std_per_token, double std,
                      const std::optional<Tensor>& step_per_token, double step_size,
                      const std::optional<Tensor>& epsilon_per_token, double epsilon, const std::optional<Tensor>& mask,
                      const Tensor& perturbed, const Tensor& new_delta, const Tensor& statistics, bool normal,
                      int64_t stream, int64_t sample_offset, int64_t norm, int64_t normalize, int64_t level) {
  AscentArguments args;
  args.shape = token_shape(embeds);
  args.dtype = dtype_of(embeds, "embeds");
  args.grad_dtype = dtype_of(grad, "grad");
  STD_TORCH_CHECK(args.grad_dtype == Dtype::kFloat32 || args.grad_dtype == args.dtype,
                  "grad: expected float32 or the dtype of embeds, got ",
                  torch::headeronly::toString(grad.scalar_type()));
  STD_TORCH_CHECK(delta.has_value() != seed.has_value(), "delta, seed: expected exactly one of them");
  STD_TORCH_CHECK(0 <= norm && norm < 4 && 0 <= normalize && normalize < 4 && 0 <= level && level < 3,
                  "norm, normalize, level: expected numbers in [0, 4), [0, 4) and [0, 3)");
  check_contiguous(grad, embeds, "grad");
  check_type(perturbed, embeds.scalar_type(), "perturbed");
  check_contiguous(perturbed, embeds, "perturbed");
  check_type(new_delta, ScalarType::Float, "new_delta");
  check_type(statistics, ScalarType::Float, "statistics");
  if (delta.has_value()) {
    check_type(*delta, ScalarType::Float, "delta");
    check_contiguous(*delta, embeds, "delta");
    args.delta = static_cast<const float*>(delta->const_data_ptr());
  }
  args.embeds = embeds.const_data_ptr();
  args.grad = grad.const_data_ptr();
  args.perturbed = perturbed.mutable_data_ptr();
  args.new_delta = optional_output<float>(new_delta, embeds, embeds.numel(), "new_delta");
  args.statistics = optional_output<float>(statistics, embeds, kAscentStatistics * args.shape.tokens(), "statistics");
  args.noise = noise_source(seed, std_per_token, std, normal, stream, sample_offset, embeds);
  args.step_size = per_token(step_per_token, step_size, embeds, "step_size");
  args.epsilon = per_token(epsilon_per_token, epsilon, embeds, "epsilon");
  args.mask = token_mask(mask, embeds);
  args.norm = static_cast<Norm>(norm);
  args.normalize = static_cast<Normalize>(normalize);
  args.level = static_cast<Level>(level);
  if (embeds.numel() == 0) return;
  std::optional<Tensor> scratch;
  if (embeds.is_cuda()) {
    if (const int64_t bytes = cuda::ascent_scratch_bytes(args); bytes > 0) {
      scratch = torch::stable::new_empty(embeds, {bytes}, ScalarType::Byte);
      args.scratch = scratch->mutable_data_ptr();
    }
  }
  launch(args, embeds, cpu::projected_ascent, cuda::projected_ascent);
}

RowStrides row_strides(const Tensor& t) { return RowStrides::of(t.size(0), t.size(1), t.stride(0), t.stride(1)); }

LogitRows logit_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions (O, I, V), got ", t.dim());
  STD_TORCH_CHECK(t.stride(2) == 1 || t.size(2) == 1, name, ": expected neighbouring columns");
  return {t.const_data_ptr(), row_strides(t)};
}

RowVector row_vector(const Tensor& t, const Tensor& logits, const char* name) {
  check_type(t, ScalarType::Float, name);
  check_device(t, logits, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == logits.size(0) && t.size(1) == logits.size(1), name,
                  ": expected shape (O, I)");
  return {static_cast<const float*>(t.const_data_ptr()), row_strides(t)};
}

DivergenceArguments divergence_arguments(const Tensor& a, const Tensor& b, double inv_temperature, int64_t divergence,
                                         int64_t convention) {
  DivergenceArguments args;
  args.a = logit_rows(a, "a");
  args.b = logit_rows(b, "b");
  check_type(b, a.scalar_type(), "b");
  check_device(b, a, "b");
  for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(a.size(d) == b.size(d), "b: expected the shape of a");
  STD_TORCH_CHECK(a.size(2) > 0, "a: expected at least one class");
  STD_TORCH_CHECK(0 <= divergence && divergence < 2 && 0 <= convention && convention < 3,
                  "divergence, gradient: expected numbers in [0, 2) and [0, 3)");
  args.rows = a.size(0) * a.size(1);
  args.columns = a.size(2);
  args.dtype = dtype_of(a, "a");
  args.inv_temperature = static_cast<float>(inv_temperature);
  args.divergence = static_cast<Divergence>(divergence);
  args.convention = static_cast<Convention>(convention);
  return args;
}

void symmetric_kl_loss(const Tensor& a, const Tensor& b, const std::optional<Tensor>& row_weight, const Tensor& rows,
                       const Tensor& statistics, int64_t divergence, double inv_temperature) {
  DivergenceArguments args = divergence_arguments(a, b, inv_temperature, divergence, 0);
  if (args.rows == 0) return;
  if (row_weight.has_value()) args.row_weight = row_vector(*row_weight, a, "row_weight");
  check_type(rows, ScalarType::Float, "rows");
  check_type(statistics, ScalarType::Float, "statistics");
  args.loss = optional_output<float>(rows, a, args.rows, "rows");
  args.statistics = optional_output<float>(statistics, a, kRowStatistics * args.rows, "statistics");
  STD_TORCH_CHECK(args.loss != nullptr && args.statistics != nullptr, "rows, statistics: expected outputs");
  launch(args, a, cpu::divergence_loss, cuda::divergence_loss);
}

void symmetric_kl_gradient(const Tensor& a, const Tensor& b, const Tensor& statistics, const Tensor& grad_rows,
                           const Tensor& grad_a, const Tensor& grad_b, int64_t divergence, int64_t convention,
                           double inv_temperature) {
  DivergenceArguments args = divergence_arguments(a, b, inv_temperature, divergence, convention);
  if (args.rows == 0) return;
  check_type(statistics, ScalarType::Float, "statistics");
  check_device(statistics, a, "statistics");
  STD_TORCH_CHECK(statistics.is_contiguous() && statistics.numel() == kRowStatistics * args.rows,
                  "statistics: expected 5 contiguous numbers a row");
  args.statistics = const_cast<float*>(static_cast<const float*>(statistics.const_data_ptr()));  // only read
  args.grad_rows = row_vector(grad_rows, a, "grad_rows");
  check_type(grad_a, a.scalar_type(), "grad_a");
  check_type(grad_b, a.scalar_type(), "grad_b");
  args.grad_a = optional_output<void>(grad_a, a, args.rows * args.columns, "grad_a");
  args.grad_b = optional_output<void>(grad_b, a, args.rows * args.columns, "grad_b");
  launch(args, a, cpu::divergence_gradient, cuda::divergence_gradient);
}

void symmetric_kl_loss_and_gradient(const Tensor& a, const Tensor& b, const std::optional<Tensor>& row_weight,
                                    const Tensor& rows, const Tensor& grad_a, const Tensor& grad_b, int64_t divergence,
                                    int64_t convention, double inv_temperature, double grad_scale) {
  DivergenceArguments args = divergence_arguments(a, b, inv_temperature, divergence, convention);
  if (args.rows == 0) return;
  if (row_weight.has_value()) args.row_weight = row_vector(*row_weight, a, "row_weight");
  check_type(rows, ScalarType::Float, "rows");
  check_type(grad_a, a.scalar_type(), "grad_a");
  check_type(grad_b, a.scalar_type(), "grad_b");
  args.loss = optional_output<float>(rows, a, args.rows, "rows");
  args.grad_a = optional_output<void>(grad_a, a, args.rows * args.columns, "grad_a");
  args.grad_b = optional_output<void>(grad_b, a, args.rows * args.columns, "grad_b");
  STD_TORCH_CHECK(args.loss != nullptr && args.grad_a != nullptr, "rows, grad_a: expected outputs");
  args.grad_scale = static_cast<float>(grad_scale);
  launch(args, a, cpu::divergence_loss_and_gradient, cuda::divergence_loss_and_gradient);
}

// `first` is the adversarial side's product or, with `differences`, that of the difference of the hidden states. The
// gradients may lie where `first` and `b` do.
void linear_divergence(const Tensor& first, const Tensor& b, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& row_weight, const Tensor& rows, const Tensor& grad_a,
                       const Tensor& grad_sum, bool differences, int64_t divergence, int64_t convention,
                       double inv_temperature) {
  DivergenceArguments args = divergence_arguments(first, b, inv_temperature, divergence, convention);
  check_type(first, ScalarType::Float, "first");
  if (args.rows == 0) return;
  args.differences = differences;
  if (bias.has_value()) {
    check_type(*bias, ScalarType::Float, "bias");
    check_device(*bias, first, "bias");
    STD_TORCH_CHECK(bias->is_contiguous() && bias->numel() == args.columns, "bias: expected ", args.columns,
                    " contiguous elements");
    args.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (row_weight.has_value()) args.row_weight = row_vector(*row_weight, first, "row_weight");
  check_type(rows, ScalarType::Float, "rows");
  args.loss = optional_output<float>(rows, first, args.rows, "rows");
  STD_TORCH_CHECK(args.loss != nullptr, "rows: expected an output");
  args.grad_dtype = dtype_of(grad_a, "grad_a");
  check_type(grad_sum, grad_a.scalar_type(), "grad_sum");
  STD_TORCH_CHECK(first.is_cuda() || args.grad_dtype == Dtype::kFloat32, "grad_a: expected float32 on the CPU");
  args.grad_a = optional_output<void>(grad_a, first, args.rows * args.columns, "grad_a");
  args.grad_sum = optional_output<void>(grad_sum, first, args.rows * args.columns, "grad_sum");
  STD_TORCH_CHECK(args.grad_sum == nullptr || args.convention == Convention::kFull,
                  "grad_sum: expected none without the gradient of both sides");
  STD_TORCH_CHECK(args.grad_sum == nullptr || args.grad_a != nullptr, "grad_a: expected an output beside grad_sum");
  launch(args, first, cpu::linear_divergence, cuda::linear_divergence);
}

}}  // namespace alum

STABLE_TORCH_LIBRARY(alum_kernels_native, m) {
  m.def(
      "noise_init(Tensor embeds, Tensor seed, Tensor? std_per_token, float std, Tensor? mask, Tensor(a!) perturbed,"
      " Tensor(b!) delta, bool normal, int stream, int sample_offset) -> ()");
  m.def(
      "projected_ascent(Tensor embeds, Tensor grad, Tensor? delta, Tensor? seed, Tensor? std_per_token, float std,"
      " Tensor? step_per_token, float step_size, Tensor? epsilon_per_token, float epsilon, Tensor? mask,"
      " Tensor(a!) perturbed, Tensor(b!) new_delta, Tensor(c!) statistics, bool normal, int stream,"
      " int sample_offset, int norm, int normalize, int level) -> ()");
  m.def(
      "symmetric_kl_loss(Tensor a, Tensor b, Tensor? row_weight, Tensor(a!) rows, Tensor(b!) statistics,"
      " int divergence, float inv_temperature) -> ()");
  m.def(
      "symmetric_kl_gradient(Tensor a, Tensor b, Tensor statistics, Tensor grad_rows, Tensor(a!) grad_a,"
      " Tensor(b!) grad_b, int divergence, int gradient, float inv_temperature) -> ()");
  m.def(
      "symmetric_kl_loss_and_gradient(Tensor a, Tensor b, Tensor? row_weight, Tensor(a!) rows, Tensor(b!) grad_a,"
      " Tensor(c!) grad_b, int divergence, int gradient, float inv_temperature, float grad_scale) -> ()");
  m.def(
      "linear_divergence(Tensor first, Tensor b, Tensor? bias, Tensor? row_weight, Tensor(a!) rows, Tensor(b!) grad_a,"
      " Tensor(c!) grad_sum, bool differences, int divergence, int gradient, float inv_temperature) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(alum_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("noise_init", TORCH_BOX(&alum::noise_init));
  m.impl("projected_ascent", TORCH_BOX(&alum::projected_ascent));
  m.impl("symmetric_kl_loss", TORCH_BOX(&alum::symmetric_kl_loss));
  m.impl("symmetric_kl_gradient", TORCH_BOX(&alum::symmetric_kl_gradient));
  m.impl("symmetric_kl_loss_and_gradient", TORCH_BOX(&alum::symmetric_kl_loss_and_gradient));
  m.impl("linear_divergence", TORCH_BOX(&alum::linear_divergence));
}
