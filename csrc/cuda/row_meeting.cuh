// Reductions over the threads of a row, which may be spread over the blocks of a cluster.
//
// A warp combines by shuffles, the first warp of a block combines the warps, and gives what it has to every block of the
// row, through distributed shared memory where there are several: after one barrier each of them finds all partials in
// its own memory and combines them in the order of the blocks. The order depends on the launch alone, so the same input
// gives the same bits. The last step, in double, is one warp's: many chips have few units for it.
//
// Nothing is written to another block after the last barrier, so that a block may end when it likes; before the first
// write all blocks have met.
#pragma once

#include <cooperative_groups.h>

#include "core/long_row.h"
#include "cuda/row_plan.h"
#include "cuda/runtime.cuh"

namespace alum::cuda {

class RowMeeting {
 public:
  __device__ explicit RowMeeting(unsigned blocks) : blocks_(blocks) {
#if __CUDA_ARCH__ >= 900
    if (blocks_ == 1) return;
    rank_ = cooperative_groups::this_cluster().block_rank();
    cooperative_groups::this_cluster().sync();
#endif
  }

  // Which of the row's blocks this is.
  __device__ unsigned rank() const { return rank_; }

  // close(combine of all threads' values), in every thread. A value combined with itself is itself.
  template <class V, class Combine, class Close>
  __device__ __forceinline__ auto reduce(V value, const Combine& combine, const Close& close) {
    static_assert(sizeof(V) <= kRowFields * sizeof(double));
    value = warp_reduce(value, combine);
    V* const partials = reinterpret_cast<V*>(dynamic_shared);
    if (lane() == 0) partials[warp()] = value;
    __syncthreads();
    if (warp() == 0) {
      value = warp_reduce(partials[lane() < warps() ? lane() : warps() - 1], combine);
      if (lane() < static_cast<int>(blocks_)) *of_block(slot<V>(rank_), lane()) = value;
    }
    meet();
    return closed([&] {
      V all = *slot<V>(0);
      for (unsigned block = 1; block < blocks_; ++block) all = combine(all, *slot<V>(block));
      return close(all);
    });
  }

  // close(sums over all threads), in every thread: fp32 in a thread, double across threads.
  template <template <class> class Sums, class Close>
  __device__ __forceinline__ auto sum(const Sums<float>& mine, const Close& close) {
    constexpr int kFields = sizeof(mine) / sizeof(float) > 4 ? 8 : 4, kLanes = kWarp / kFields;
    static_assert(sizeof(mine) <= kFields * sizeof(float));
    float narrow[kFields] = {};
    memcpy(narrow, &mine, sizeof(mine));
    double fields[kFields];
#pragma unroll
    for (int i = 0; i < kFields; ++i) fields[i] = narrow[i];
    double field = scattered_sum(fields);
    // kLanes lanes hold the same field
    const int index = lane() / kLanes, place = lane() % kLanes;
    double* const partials = reinterpret_cast<double*>(dynamic_shared);
    if (place == 0) partials[warp() * kFields + index] = field;
    __syncthreads();
    if (warp() == 0) {
      field = 0.0;
      for (int i = place; i < warps(); i += kLanes) field += partials[i * kFields + index];
#pragma unroll
      for (int step = kLanes / 2; step >= 1; step /= 2) field += shuffle_xor(field, step);
      for (unsigned to = place; to < blocks_; to += kLanes) *of_block(slot<double>(rank_) + index, to) = field;
    }
    meet();
    return closed([&] {
      Sums<double> all = *slot<Sums<double>>(0);
      for (unsigned block = 1; block < blocks_; ++block) all = plus(all, *slot<Sums<double>>(block));
      return close(all);
    });
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  static __device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x) / kWarp; }

  // What `block` has to say in this reduction. Those of the one before may still be read: they take turns.
  template <class V>
  __device__ __forceinline__ V* slot(unsigned block) const {
    const unsigned offset = turn_ * kSlotBytes + block * (kRowFields * sizeof(double));
    return reinterpret_cast<V*>(dynamic_shared + kPartialBytes + offset);
  }

  // The same place in the shared memory of another block of the row.
  template <class V>
  __device__ __forceinline__ V* of_block(V* here, unsigned block) const {
#if __CUDA_ARCH__ >= 900
    if (blocks_ > 1) return cooperative_groups::this_cluster().map_shared_rank(here, block);
#endif
    return here;
  }

  __device__ __forceinline__ void meet() const {
#if __CUDA_ARCH__ >= 900
    if (blocks_ > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }

  // work(), done by the first warp, in every thread.
  template <class Work>
  __device__ __forceinline__ auto closed(const Work& work) {
    using Result = decltype(work());
    static_assert(sizeof(Result) <= kResultBytes);
    Result* const result = reinterpret_cast<Result*>(dynamic_shared + kPartialBytes + 2 * kSlotBytes);
    if (warp() == 0) {
      const Result mine = work();
      if (lane() == 0) *result = mine;
    }
    __syncthreads();
    turn_ ^= 1;
    return *result;
  }

  // The sum of one field over the warp, that of index lane / (32 / kFields): at each step a lane gives half of its
  // fields away, which takes a third of the additions of summing all of them in every lane.
  template <int kFields>
  static __device__ __forceinline__ double scattered_sum(double (&fields)[kFields]) {
    int step = kWarp / 2;
#pragma unroll
    for (int half = kFields / 2; half >= 1; half /= 2) {
      const bool upper = (lane() & step) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const double kept = upper ? fields[i + half] : fields[i], given = upper ? fields[i] : fields[i + half];
        fields[i] = kept + shuffle_xor(given, step);
      }
      step /= 2;
    }
#pragma unroll
    for (int rest = kWarp / kFields / 2; rest >= 1; rest /= 2) fields[0] += shuffle_xor(fields[0], rest);
    return fields[0];
  }

  unsigned blocks_, rank_ = 0, turn_ = 0;
};

}  // namespace alum::cuda
