// C functions that run the CUDA kernels on tensors in host memory: arguments as csrc/ops.cpp fills them. Each returns null,
// or what went wrong.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "scheduler.h"

namespace alum::cuda {

alignas(emulation::kPage) unsigned char dynamic_shared[emulation::kSharedCapacity];

}  // namespace alum::cuda

namespace {

using namespace alum;

// A tensor of up to three dimensions; a null pointer to one is an argument that was not given.
struct View {
  void* data;
  int64_t size[3], stride[3];
  int64_t element_bytes;
  int32_t dtype;
};

template <class Run>
const char* guarded(const Run& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void* data_of(const View* t) { return t == nullptr ? nullptr : t->data; }

PerToken per_token(const View* t, double value) {
  if (t == nullptr) return {nullptr, 0, 0, static_cast<float>(value)};
  return {static_cast<const float*>(t->data), t->stride[0], t->stride[1], 0.0f};
}

TokenMask token_mask(const View* t) {
  if (t == nullptr) return {};
  return {static_cast<const uint8_t*>(t->data), t->stride[0] * t->element_bytes, t->stride[1] * t->element_bytes};
}

TokenShape token_shape(const View* t) { return {t->size[0], t->size[1], t->size[2]}; }

NoiseSource noise_source(const View* seed, const View* std_per_token, double std, bool normal, int64_t stream,
                         int64_t sample_offset) {
  return {static_cast<const int64_t*>(data_of(seed)), per_token(std_per_token, std), normal,
          static_cast<uint32_t>(stream), sample_offset};
}

RowStrides row_strides(const View* t) { return RowStrides::of(t->size[0], t->size[1], t->stride[0], t->stride[1]); }

RowVector row_vector(const View* t) {
  if (t == nullptr) return {};
  return {static_cast<const float*>(t->data), row_strides(t)};
}

DivergenceArguments divergence_arguments(const View* a, const View* b, int divergence, int convention,
                                         double inv_temperature) {
  DivergenceArguments args;
  args.a = {a->data, row_strides(a)};
  args.b = {b->data, row_strides(b)};
  args.rows = a->size[0] * a->size[1];
  args.columns = a->size[2];
  args.dtype = static_cast<Dtype>(a->dtype);
  args.divergence = static_cast<Divergence>(divergence);
  args.convention = static_cast<Convention>(convention);
  args.inv_temperature = static_cast<float>(inv_temperature);
  return args;
}

}  // namespace

extern "C" {

void emulated_device(int order, int64_t shuffle_seed, int64_t shared_limit, int multiprocessors,
                     int blocks_per_multiprocessor, int64_t largest_grid, int capability) {
  emulation::Device& device = emulation::device;
  device.order = static_cast<emulation::Order>(order);
  device.shuffle_seed = static_cast<uint64_t>(shuffle_seed);
  device.shared_limit = static_cast<size_t>(shared_limit);
  device.multiprocessors = multiprocessors;
  device.blocks_per_multiprocessor = blocks_per_multiprocessor;
  device.largest_grid = static_cast<unsigned>(largest_grid);
  device.capability = capability;
  device.shared = cuda::dynamic_shared;
}

int emulated_last_cluster() { return static_cast<int>(emulation::device.last_cluster); }

int64_t emulated_launches() { return emulation::device.launches; }

const char* emulated_noise_init(const View* embeds, const View* seed, const View* std_per_token, double std,
                                const View* mask, const View* perturbed, const View* delta, int normal, int64_t stream,
                                int64_t sample_offset) {
  return guarded([&] {
    NoiseArguments args;
    args.shape = token_shape(embeds);
    args.dtype = static_cast<Dtype>(embeds->dtype);
    args.embeds = embeds->data;
    args.perturbed = perturbed->data;
    args.delta = static_cast<float*>(data_of(delta));
    args.noise = noise_source(seed, std_per_token, std, normal != 0, stream, sample_offset);
    args.mask = token_mask(mask);
    cuda::noise_init(args, nullptr);
  });
}

const char* emulated_projected_ascent(const View* embeds, const View* grad, const View* delta, const View* seed,
                                      const View* std_per_token, double std, const View* step_per_token,
                                      double step_size, const View* epsilon_per_token, double epsilon, const View* mask,
                                      const View* perturbed, const View* new_delta, const View* statistics, int normal,
                                      int64_t stream, int64_t sample_offset, int norm, int normalize, int level) {
  return guarded([&] {
    AscentArguments args;
    args.shape = token_shape(embeds);
    args.dtype = static_cast<Dtype>(embeds->dtype);
    args.grad_dtype = static_cast<Dtype>(grad->dtype);
    args.embeds = embeds->data;
    args.grad = grad->data;
    args.delta = static_cast<const float*>(data_of(delta));
    args.perturbed = perturbed->data;
    args.new_delta = static_cast<float*>(data_of(new_delta));
    args.statistics = static_cast<float*>(data_of(statistics));
    args.noise = noise_source(seed, std_per_token, std, normal != 0, stream, sample_offset);
    args.step_size = per_token(step_per_token, step_size);
    args.epsilon = per_token(epsilon_per_token, epsilon);
    args.mask = token_mask(mask);
    args.norm = static_cast<Norm>(norm);
    args.normalize = static_cast<Normalize>(normalize);
    args.level = static_cast<Level>(level);
    constexpr size_t kMargin = 64;
    const size_t bytes = static_cast<size_t>(cuda::ascent_scratch_bytes(args));
    std::vector<unsigned char> scratch(bytes + kMargin, 0xFF);
    args.scratch = scratch.data();
    cuda::projected_ascent(args, nullptr);
    for (size_t i = bytes; i < scratch.size(); ++i) {
      if (scratch[i] != 0xFF) throw std::runtime_error("scratch memory was written beyond its end");
    }
  });
}

const char* emulated_divergence_loss(const View* a, const View* b, const View* row_weight, const View* rows,
                                     const View* statistics, int divergence, double inv_temperature) {
  return guarded([&] {
    DivergenceArguments args = divergence_arguments(a, b, divergence, 0, inv_temperature);
    args.row_weight = row_vector(row_weight);
    args.loss = static_cast<float*>(rows->data);
    args.statistics = static_cast<float*>(statistics->data);
    cuda::divergence_loss(args, nullptr);
  });
}

const char* emulated_divergence_gradient(const View* a, const View* b, const View* statistics, const View* grad_rows,
                                         const View* grad_a, const View* grad_b, int divergence, int convention,
                                         double inv_temperature) {
  return guarded([&] {
    DivergenceArguments args = divergence_arguments(a, b, divergence, convention, inv_temperature);
    args.statistics = static_cast<float*>(statistics->data);
    args.grad_rows = row_vector(grad_rows);
    args.grad_a = data_of(grad_a);
    args.grad_b = data_of(grad_b);
    cuda::divergence_gradient(args, nullptr);
  });
}

const char* emulated_divergence_loss_and_gradient(const View* a, const View* b, const View* row_weight,
                                                  const View* rows, const View* grad_a, const View* grad_b,
                                                  int divergence, int convention, double inv_temperature,
                                                  double grad_scale) {
  return guarded([&] {
    DivergenceArguments args = divergence_arguments(a, b, divergence, convention, inv_temperature);
    args.row_weight = row_vector(row_weight);
    args.loss = static_cast<float*>(rows->data);
    args.grad_a = grad_a->data;
    args.grad_b = data_of(grad_b);
    args.grad_scale = static_cast<float>(grad_scale);
    cuda::divergence_loss_and_gradient(args, nullptr);
  });
}

const char* emulated_linear_divergence(const View* first, const View* b, const View* bias, const View* row_weight,
                                       const View* rows, const View* grad_a, const View* grad_sum, int differences,
                                       int divergence, int convention, double inv_temperature, double grad_scale) {
  return guarded([&] {
    DivergenceArguments args = divergence_arguments(first, b, divergence, convention, inv_temperature);
    args.differences = differences != 0;
    args.bias = static_cast<const float*>(data_of(bias));
    args.row_weight = row_vector(row_weight);
    args.loss = static_cast<float*>(rows->data);
    args.grad_a = data_of(grad_a);
    args.grad_sum = data_of(grad_sum);
    if (grad_a != nullptr) args.grad_dtype = static_cast<Dtype>(grad_a->dtype);
    args.grad_scale = static_cast<float>(grad_scale);
    cuda::linear_divergence(args, nullptr);
  });
}

}  // extern "C"
