// Kernels that do what hardware leaves undefined: the emulation has to notice each of them.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <map>
#include <string>

#include "cuda/runtime.cuh"

namespace {

using namespace alum::cuda;

constexpr int kThreads = 64;

__global__ void barrier_in_a_branch(float* out) {
  if (threadIdx.x < kWarp) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < kWarp) {
    __syncthreads();
    out[0] = 1.0f;
  } else {
    __syncthreads();
    out[1] = 2.0f;
  }
}

__global__ void shuffle_in_a_branch(float* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = shuffle_xor(1.0f, 2);
}

__global__ void grid_barrier(float* out) {
  cooperative_groups::this_grid().sync();
  out[threadIdx.x] = 1.0f;
}

__global__ void grid_barrier_in_a_branch(float* out) {
  if (blockIdx.x == 0) cooperative_groups::this_grid().sync();
  out[threadIdx.x] = 1.0f;
}

__global__ void cluster_barrier(float* out) {
  cooperative_groups::this_cluster().sync();
  out[threadIdx.x] = 1.0f;
}

__global__ void cluster_barrier_in_a_branch(float* out) {
  if (blockIdx.x == 0) cooperative_groups::this_cluster().sync();
  out[threadIdx.x] = 1.0f;
}

float* of_sibling(unsigned float_index) {
  float* room = reinterpret_cast<float*>(dynamic_shared);
  return cooperative_groups::this_cluster().map_shared_rank(room + float_index, 1 - blockIdx.x);
}

__global__ void sibling_not_begun(float*) {
  *of_sibling(threadIdx.x) = 1.0f;
  cooperative_groups::this_cluster().sync();
}

__global__ void sibling_ended(float* out) {
  cooperative_groups::this_cluster().sync();
  out[threadIdx.x] = *of_sibling(threadIdx.x);
}

__global__ void sibling_beyond(float*) {
  cooperative_groups::this_cluster().sync();
  *of_sibling(threadIdx.x + 1) = 1.0f;
  cooperative_groups::this_cluster().sync();
}

__global__ void sibling_overrun(float*) {
  cooperative_groups::this_cluster().sync();
  of_sibling(threadIdx.x)[1] = 1.0f;
  cooperative_groups::this_cluster().sync();
}

__global__ void beyond_shared(float* out) {
  reinterpret_cast<float*>(dynamic_shared)[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

__global__ void copy_not_waited_for(float* out) {
  float* room = reinterpret_cast<float*>(dynamic_shared);
  out[threadIdx.x] = 3.0f;
  __pipeline_memcpy_async(room + threadIdx.x, out + threadIdx.x, sizeof(float));
  __pipeline_commit();
  out[threadIdx.x] = room[threadIdx.x];
  __pipeline_wait_prior(0);
}

__global__ void misaligned(float* out) {
  const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(out + 1);
  out[threadIdx.x] = four.values[0];
}

// No barrier between the writing and the reading of shared memory: what is read depends on the order of the warps.
__global__ void race(float* out) {
  float* room = reinterpret_cast<float*>(dynamic_shared);
  room[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = room[(threadIdx.x + kWarp) % kThreads];
}

__global__ void large(float* out) { out[threadIdx.x] = 1.0f; }

void launch_unasked(float* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = 64 * 1024;
  check(cudaLaunchKernelEx(&config, large, out), "kernel launch");
}

}  // namespace

// `out` holds kThreads floats, aligned to 16 bytes. Null, or what was noticed.
extern "C" const char* emulated_misuse(const char* name, float* out) {
  static std::string message;
  const std::map<std::string, void (*)(float*)> kernels{{"barrier_in_a_branch", barrier_in_a_branch},
                                                        {"two_barriers", two_barriers},
                                                        {"shuffle_in_a_branch", shuffle_in_a_branch},
                                                        {"grid_barrier", grid_barrier},
                                                        {"beyond_shared", beyond_shared},
                                                        {"misaligned", misaligned},
                                                        {"race", race},
                                                        {"copy_not_waited_for", copy_not_waited_for},
                                                        {"grid_barrier_in_a_branch", grid_barrier_in_a_branch},
                                                        {"cluster_barrier", cluster_barrier},
                                                        {"cluster_barrier_in_a_branch", cluster_barrier_in_a_branch},
                                                        {"sibling_not_begun", sibling_not_begun},
                                                        {"sibling_ended", sibling_ended},
                                                        {"sibling_beyond", sibling_beyond},
                                                        {"sibling_overrun", sibling_overrun}};
  try {
    if (std::string(name) == "large") {
      launch_unasked(out);
    } else {
      LaunchShape shape{dim3(2), dim3(kThreads)};
      shape.shared_bytes = kThreads * sizeof(float);
      if (std::string(name) == "grid_barrier_in_a_branch") {
        shape.cooperative = true;
        shape.shared_bytes = 0;
      }
      if (std::string(name) == "cluster_barrier_in_a_branch" || std::string(name).rfind("sibling", 0) == 0) {
        shape.cluster = 2;
      }
      launch(kernels.at(name), shape, nullptr, out);
    }
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
