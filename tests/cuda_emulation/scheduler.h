// Runs the threads of a CUDA grid as fibers on one host thread, and refuses what hardware leaves undefined.
//
// A fiber runs until it waits: at a warp shuffle, at a barrier of its block, its cluster or the grid. Which of the runnable fibers goes on
// is a choice of `Order`: in ascending order a warp runs to its barrier before the next one starts, in descending order
// the last warp does, and a shuffled order mixes warps and lanes. A kernel without races gives the same bits in all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace emulation {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

enum class Order : int { kAscending = 0, kDescending = 1, kShuffled = 2 };

// The emulated device. Defaults are an H100's shared memory on two small multiprocessors.
struct Device {
  Order order = Order::kAscending;
  uint64_t shuffle_seed = 1;
  int multiprocessors = 2, blocks_per_multiprocessor = 2;
  int capability = 80;                 // 10 major + minor; clusters from 90 on
  size_t shared_limit = 227 * 1024;    // what a block may opt in to
  unsigned largest_grid = 0x7fffffff;  // wider grids are cut to this: kernels stride over the rest
  unsigned char* shared = nullptr;     // kSharedCapacity bytes, page-aligned
  int64_t launches = 0;
  unsigned last_cluster = 1;
};
inline Device device;

constexpr size_t kPage = 4096, kSharedCapacity = 256 * 1024;

// What a kernel may not do: undefined on hardware, an error here.
struct Misuse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One launch; throws Misuse. `body` is the kernel, called once a thread. Blocks are one-dimensional; `cluster`
// neighbours of them run together.
void run_grid(Index grid, Index block, size_t shared_bytes, bool cooperative, unsigned cluster,
              const std::function<void()>& body);

// Called by kernels. Where a call stands in the code is its return address: threads that meet must meet at one place.
void wait_for_block();
void wait_for_cluster();
void wait_for_grid();
int exchange(unsigned mask, int value, int lanes);

// Where `address`, in shared memory, lies in that of another block of the cluster, which must be running.
void* map_shared(void* address, unsigned rank);
unsigned cluster_rank();

// An asynchronous copy, which is made when the thread waits for it; NaN lies there until then.
void copy_later(void* to, const void* from, size_t bytes);
void finish_copies();

// Ends the launch from inside a kernel.
[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation
