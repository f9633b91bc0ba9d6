// The CUDA side of each op: one launch on the given stream of the current device. Without nvcc, functions that say so.
#pragma once

#include "core/arguments.h"

namespace alum::cuda {

void noise_init(const NoiseArguments& args, void* stream);
void projected_ascent(const AscentArguments& args, void* stream);
void divergence_loss(const DivergenceArguments& args, void* stream);
void divergence_gradient(const DivergenceArguments& args, void* stream);
void divergence_loss_and_gradient(const DivergenceArguments& args, void* stream);
void linear_divergence(const DivergenceArguments& args, void* stream);

// Device memory that projected_ascent wants in args.scratch.
int64_t ascent_scratch_bytes(const AscentArguments& args);

// torch's current stream of a device, as a cudaStream_t.
void* current_stream(int32_t device_index);

// Whether libtorch_cuda provided the function behind current_stream.
bool stream_resolved();

// Architectures with machine code in this module, such as "80,86,90a", or "" where it was built without CUDA.
const char* architectures();

}  // namespace alum::cuda
