// What every CUDA kernel here needs: storage types, warp and block reductions in a fixed order, checked launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core/arguments.h"
#include "core/lane.h"

namespace alum::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The one dynamic shared buffer; kernels lay out what they need in it.
extern __shared__ __align__(16) unsigned char dynamic_shared[];

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("alum_kernels: ") + what + ": " + cudaGetErrorString(status));
  }
}

// ---- storage types: arithmetic is fp32 ----

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// kCount neighbouring elements, moved in one access where they are aligned to their size.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// call(T*) with the storage type that `dtype` names.
template <class Call>
void with_type(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat32:
      return call(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return call(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return call(static_cast<__half*>(nullptr));
  }
}

// ---- reductions: the order depends on the launch alone, so the same input gives the same bits ----

// Any trivially copyable value, a word at a time.
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int lanes) {
  static_assert(sizeof(V) % sizeof(int) == 0);
  int words[sizeof(V) / sizeof(int)];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (size_t i = 0; i < sizeof(V) / sizeof(int); ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], lanes);
  memcpy(&value, words, sizeof(V));
  return value;
}

// combine(x, y) of all lanes, in every lane. Lanes are paired as (low, high), so that combine need not commute.
template <class V, class Combine>
__device__ __forceinline__ V warp_reduce(V value, const Combine& combine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const V other = shuffle_xor(value, step);
    value = (lane & step) == 0 ? combine(value, other) : combine(other, value);
  }
  return value;
}

// combine of all threads of a one-dimensional block, in every thread. `room` holds a V a warp; it may be used again
// after the call.
template <class V, class Combine>
__device__ __forceinline__ V block_reduce(V value, V* room, const Combine& combine) {
  value = warp_reduce(value, combine);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane == 0) room[warp] = value;
  __syncthreads();
  value = room[0];
  for (int i = 1; i < warps; ++i) value = combine(value, room[i]);
  __syncthreads();
  return value;
}

// ---- launches ----

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  unsigned cluster = 1;  // blocks; the grid is a multiple of it
};

// Launch and check. More than 48 KB of shared memory has to be asked for.
template <class Args, class... Rest>
void launch(void (*kernel)(Args, Rest...), const LaunchShape& shape, void* stream, const Args& args,
            const Rest&... rest) {
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, args, rest...), "kernel launch");
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Blocks for `items`, at most what a grid dimension holds; kernels stride over the rest.
inline unsigned grid_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

}  // namespace alum::cuda
