// torch's stream and the facts of this build. libtorch_cuda is not linked: where it is loaded, its C function is found
// through a weak symbol, and where it is not, the module loads all the same.
#include "cuda/launch.h"
#include "cuda/runtime.cuh"

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace alum::cuda {

bool stream_resolved() { return aoti_torch_get_current_cuda_stream != nullptr; }

void* current_stream(int32_t device_index) {
  if (!stream_resolved()) {
    throw std::runtime_error("alum_kernels: libtorch_cuda did not provide aoti_torch_get_current_cuda_stream");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
    throw std::runtime_error("alum_kernels: torch has no current stream for this device");
  }
  return stream;
}

const char* architectures() { return ALUM_CUDA_ARCHITECTURES; }

}  // namespace alum::cuda
