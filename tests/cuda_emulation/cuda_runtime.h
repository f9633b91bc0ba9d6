// The part of the CUDA runtime and of CUDA C++ that the kernels use, on a CPU: see scheduler.h.
//
// The compiler includes this file before anything else, as nvcc does its own. __CUDACC__ and __CUDA_ARCH__ are defined, so
// that the code taken is the device's.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "scheduler.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- device functions ----

__forceinline__ void __syncthreads() { emulation::wait_for_block(); }
__forceinline__ int __shfl_xor_sync(unsigned mask, int value, int lanes) {
  return emulation::exchange(mask, value, lanes);
}
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
// Never part of a fused multiply-add, whatever is inlined around it.
__attribute__((noinline, optimize("fp-contract=off"))) inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidClusterSize,
  cudaErrorCooperativeLaunchTooLarge
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension
};

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default:
      return "no error";
  }
}

namespace emulation {

constexpr size_t kSharedWithoutAsking = 48 * 1024;
inline std::map<const void*, size_t> shared_asked_for;

}  // namespace emulation

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulation::device.shared_limit) return cudaErrorInvalidValue;
  emulation::shared_asked_for[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulation::device.shared_limit);
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulation::device.capability % 10;
      break;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = emulation::device.blocks_per_multiprocessor;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const auto outside = [](unsigned n, unsigned limit) { return n == 0 || n > limit; };
  if (outside(grid.x, 0x7fffffff) || outside(grid.y, 65535) || outside(grid.z, 65535) || outside(block.x, 1024)) {
    return cudaErrorInvalidConfiguration;
  }
  const auto asked = emulation::shared_asked_for.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = asked == emulation::shared_asked_for.end()
                             ? emulation::kSharedWithoutAsking
                             : std::max(asked->second, emulation::kSharedWithoutAsking);
  if (config->dynamicSmemBytes > std::min(allowed, emulation::device.shared_limit)) return cudaErrorInvalidValue;
  bool cooperative = false;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    cooperative |= attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative != 0;
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    cluster = attribute.val.clusterDim.x;
    if (emulation::device.capability < 90 || outside(cluster, 8) || attribute.val.clusterDim.y != 1 ||
        attribute.val.clusterDim.z != 1 || grid.x % cluster != 0) {
      return cudaErrorInvalidClusterSize;
    }
  }
  const int64_t at_once =
      static_cast<int64_t>(emulation::device.multiprocessors) * emulation::device.blocks_per_multiprocessor;
  if (cooperative && static_cast<int64_t>(grid.x) * grid.y * grid.z > at_once)
    return cudaErrorCooperativeLaunchTooLarge;
  // the kernel gets copies of its arguments, made once: a launch does not wait for it
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  const unsigned across = std::max(std::min(grid.x, emulation::device.largest_grid) / cluster, 1u) * cluster;
  emulation::run_grid({across, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes, cooperative,
                      cluster, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
