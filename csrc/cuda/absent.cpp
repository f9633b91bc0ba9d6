// Stands in for the CUDA kernels where the module is built without nvcc.
#include <stdexcept>

#include "cuda/launch.h"

namespace alum::cuda {
namespace {

[[noreturn]] void refuse() { throw std::runtime_error("alum_kernels: the native module was built without CUDA"); }

}  // namespace

void noise_init(const NoiseArguments&, void*) { refuse(); }
void projected_ascent(const AscentArguments&, void*) { refuse(); }
void divergence_loss(const DivergenceArguments&, void*) { refuse(); }
void divergence_gradient(const DivergenceArguments&, void*) { refuse(); }
void divergence_loss_and_gradient(const DivergenceArguments&, void*) { refuse(); }
void linear_divergence(const DivergenceArguments&, void*) { refuse(); }
int64_t ascent_scratch_bytes(const AscentArguments&) { return 0; }
void* current_stream(int32_t) { refuse(); }
bool stream_resolved() { return false; }
const char* architectures() { return ""; }

}  // namespace alum::cuda
