#include "scheduler.h"

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xFF, kCanary = 0xC5;

enum class Wait { kReady, kExchange, kBlock, kCluster, kGrid, kExited };

// A stack with a page behind it that nobody may touch.
class Stack {
 public:
  Stack() {
    void* const memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(memory);
  }
  ~Stack() { munmap(base_, kPage + kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* low() const { return base_ + kPage; }

 private:
  unsigned char* base_;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Stack stack;
  ucontext_t first;    // how it starts
  std::jmp_buf place;  // where it goes on
  bool started = false;
  uint3 thread, block;
  Wait wait = Wait::kExited;
  const void* site = nullptr;
  unsigned mask = 0;
  int value = 0, lanes = 0;
  std::vector<Copy> copies;  // under way
};

std::vector<std::unique_ptr<Thread>> pool;  // threads are reused from block to block: a stack costs system calls
Thread* current = nullptr;
std::jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;
bool cooperative_launch = false;
unsigned cluster_blocks = 1;
std::string refusal;
std::mt19937_64 shuffle;

// Switches by longjmp: swapcontext would ask the kernel for the signal mask each time.
void leave(Wait wait) {
  current->wait = wait;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*kernel)();
    current->site = nullptr;
    leave(Wait::kExited);
  }
}

void enter(Thread& thread) {
  current = &thread;
  threadIdx = thread.thread;
  blockIdx = thread.block;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    getcontext(&thread.first);
    thread.first.uc_stack.ss_sp = thread.stack.low();
    thread.first.uc_stack.ss_size = kStackBytes;
    thread.first.uc_link = nullptr;
    makecontext(&thread.first, live, 0);
    setcontext(&thread.first);
  }
  current = nullptr;
  if (!refusal.empty()) throw Misuse(refusal);
}

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kExchange:
      return "at a warp shuffle";
    case Wait::kBlock:
      return "at __syncthreads";
    case Wait::kCluster:
      return "at cluster.sync";
    case Wait::kGrid:
      return "at grid.sync";
    case Wait::kExited:
      return "at its end";
    default:
      return "running";
  }
}

[[noreturn]] void diverged(const char* what, const Thread& x, const Thread& y) {
  char text[256];
  std::snprintf(text, sizeof(text), "%s diverges in block (%u, %u): thread %u is %s, thread %u is %s%s", what,
                x.block.x, x.block.y, x.thread.x, name_of(x.wait), y.thread.x, name_of(y.wait),
                x.wait == y.wait ? ", elsewhere" : "");
  throw Misuse(text);
}

bool together(const Thread& x, const Thread& y) {
  return x.wait == y.wait && x.site == y.site &&
         (x.wait != Wait::kExchange || (x.mask == y.mask && x.lanes == y.lanes));
}

template <class Iterator>
void arrange(Iterator first, Iterator last) {
  if (device.order == Order::kDescending) std::reverse(first, last);
  if (device.order == Order::kShuffled) std::shuffle(first, last, shuffle);
}

class Block {
 public:
  Block(uint3 index, int threads, size_t first_thread) : first_(first_thread), count_(threads) {
    for (int i = 0; i < count_; ++i) {
      Thread& t = at(i);
      t.wait = Wait::kReady;
      t.thread = {static_cast<unsigned>(i), 0, 0};
      t.block = index;
    }
  }

  // Runs until all threads wait for other blocks (true) or have ended (false).
  bool advance() {
    for (;;) {
      settle();
      const Thread& leader = at(0);
      for (int i = 1; i < count_; ++i) {
        if (!together(leader, at(i))) diverged("a block", leader, at(i));
      }
      if (leader.wait != Wait::kBlock) return leader.wait != Wait::kExited;
      release();
    }
  }

  void release() {
    for (int i = 0; i < count_; ++i) at(i).wait = Wait::kReady;
  }

  const Thread& leader() const { return *pool[first_]; }

 private:
  Thread& at(int i) { return *pool[first_ + i]; }

  // Until every thread waits for the others of its block or grid, or has ended.
  void settle() {
    std::vector<int> warps;
    for (int w = 0; w * kWarp < count_; ++w) warps.push_back(w);
    arrange(warps.begin(), warps.end());
    while (!warps.empty()) {
      // ascending and descending: one warp as far as it goes; shuffled: now this one, now that
      const size_t pick = device.order == Order::kShuffled ? shuffle() % warps.size() : 0;
      if (!pass(warps[pick])) warps.erase(warps.begin() + pick);
    }
  }

  // Lets each lane of a warp run until it waits; whether the warp can go on, having met at a shuffle.
  bool pass(int warp) {
    const int low = warp * kWarp, high = std::min(low + kWarp, count_);
    int lanes[kWarp];
    std::iota(lanes, lanes + (high - low), low);
    arrange(lanes, lanes + (high - low));
    int exchanging = -1;
    for (int lane = 0; lane < high - low; ++lane) {
      const int i = lanes[lane];
      if (at(i).wait == Wait::kReady) enter(at(i));
      if (at(i).wait == Wait::kExchange) exchanging = i;
    }
    if (exchanging < 0) return false;
    int values[kWarp];
    for (int i = low; i < high; ++i) {
      if (!together(at(exchanging), at(i))) diverged("a warp", at(exchanging), at(i));
      values[i - low] = at(i).value;
    }
    if (at(low).mask != 0xffffffffu || high - low != kWarp) throw Misuse("a shuffle names lanes that are not there");
    for (int i = low; i < high; ++i) {
      at(i).value = values[(i - low) ^ at(i).lanes];
      at(i).wait = Wait::kReady;
    }
    return true;
  }

  size_t first_;
  int count_;
};

// Shared memory of the blocks that run together, each with a canary behind it and no access beyond. It is that of the
// one whose turn it is that lies where kernels look for it; the others' is kept in images, which siblings may reach.
class SharedMemory {
 public:
  SharedMemory(size_t bytes, size_t blocks)
      : bytes_(bytes), open_((bytes + kPage - 1) / kPage * kPage + kPage), images_(blocks) {
    protect(PROT_NONE);
    for (auto& image : images_) image.resize(blocks > 1 ? open_ : 0);
  }
  ~SharedMemory() { protect(PROT_READ | PROT_WRITE); }

  // What every block begins with: NaN.
  void poison() {
    std::memset(device.shared, kPoison, bytes_);
    std::memset(device.shared + bytes_, kCanary, open_ - bytes_);
    for (size_t block = 0; block < images_.size(); ++block) store(block);
    begun_.assign(images_.size(), false);
    ended_.assign(images_.size(), false);
  }

  void load(size_t block) {
    running_ = block;
    begun_[block] = true;
    std::copy(images_[block].begin(), images_[block].end(), device.shared);
  }

  void store(size_t block) { std::copy_n(device.shared, images_[block].size(), images_[block].begin()); }

  void end(size_t block) { ended_[block] = true; }

  void inspect() const {
    for (size_t i = bytes_; i < open_; ++i) {
      if (device.shared[i] != kCanary) {
        throw Misuse("shared memory: byte " + std::to_string(i) + " of " + std::to_string(bytes_) + " was written");
      }
    }
  }

  void* of_sibling(void* address, unsigned rank) {
    const size_t offset = static_cast<unsigned char*>(address) - device.shared;
    if (offset >= bytes_) refuse("shared memory of a sibling: byte %zu of %zu was asked for", offset, bytes_);
    if (rank >= images_.size()) refuse("shared memory of block %u of a cluster of %zu", rank, images_.size());
    if (rank == running_) return address;
    if (!begun_[rank]) refuse("shared memory of a sibling that need not have begun");
    if (ended_[rank]) refuse("shared memory of a sibling that may have ended");
    return images_[rank].data() + offset;
  }

 private:
  void protect(int access) {
    if (open_ < kSharedCapacity && mprotect(device.shared + open_, kSharedCapacity - open_, access) != 0) {
      throw std::runtime_error("mprotect");
    }
  }

  size_t bytes_, open_, running_ = 0;
  std::vector<std::vector<unsigned char>> images_;
  std::vector<bool> begun_, ended_;
};

SharedMemory* shared_memory = nullptr;

// Blocks that meet at barriers: a cluster, or the grid of a cooperative launch.
void run_together(const std::vector<uint3>& indices, int threads, SharedMemory& shared) {
  shared.poison();
  std::vector<Block> blocks;
  std::vector<size_t> turns;
  for (const uint3& index : indices) {
    turns.push_back(blocks.size());
    blocks.emplace_back(index, threads, blocks.size() * threads);
  }
  arrange(turns.begin(), turns.end());
  for (bool meeting = true; meeting;) {
    if (device.order == Order::kShuffled) arrange(turns.begin(), turns.end());
    for (const size_t turn : turns) {
      Block& block = blocks[turn];
      shared.load(turn);
      meeting = block.advance();
      shared.inspect();
      shared.store(turn);
      if (!meeting) shared.end(turn);
      const Thread& leader = blocks[turns[0]].leader();
      if (!together(leader, block.leader())) {
        diverged(cooperative_launch ? "the grid" : "a cluster", leader, block.leader());
      }
    }
    if (meeting) {
      for (Block& block : blocks) block.release();
    }
  }
}

void run_blocks(Index grid, int threads, size_t shared_bytes) {
  std::vector<std::vector<uint3>> groups;  // of blocks that run together
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (cooperative_launch ? groups.empty() : x % cluster_blocks == 0) groups.emplace_back();
        groups.back().push_back({x, y, z});
      }
    }
  }
  arrange(groups.begin(), groups.end());
  const size_t at_once = groups[0].size();
  while (pool.size() < at_once * threads) pool.push_back(std::make_unique<Thread>());
  SharedMemory shared(shared_bytes, at_once);
  shared_memory = &shared;
  for (const auto& group : groups) run_together(group, threads, shared);
}

}  // namespace

void run_grid(Index grid, Index block, size_t shared_bytes, bool cooperative, unsigned cluster,
              const std::function<void()>& body) {
  if (block.y != 1 || block.z != 1) throw Misuse("blocks of more than one dimension are not emulated");
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};
  kernel = &body;
  cooperative_launch = cooperative;
  cluster_blocks = cluster;
  shuffle.seed(device.shuffle_seed);
  ++device.launches;
  device.last_cluster = cluster;
  try {
    run_blocks(grid, static_cast<int>(block.x), shared_bytes);
  } catch (...) {
    for (auto& thread : pool) {
      thread->started = false;
      thread->copies.clear();
    }
    refusal.clear();
    throw;
  }
}

void wait_for_block() {
  current->site = __builtin_return_address(0);
  leave(Wait::kBlock);
}

void wait_for_cluster() {
  if (cluster_blocks == 1) refuse("cluster.sync in a launch without clusters");
  current->site = __builtin_return_address(0);
  leave(Wait::kCluster);
}

void* map_shared(void* address, unsigned rank) { return shared_memory->of_sibling(address, rank); }

void copy_later(void* to, const void* from, size_t bytes) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || !aligned(to) || !aligned(from)) {
    refuse("an asynchronous copy of %zu bytes, or misaligned", bytes);
  }
  const size_t offset = static_cast<unsigned char*>(to) - device.shared;
  if (offset >= kSharedCapacity) refuse("an asynchronous copy to elsewhere than shared memory");
  std::memset(to, kPoison, bytes);
  current->copies.push_back({to, from, bytes});
}

void finish_copies() {
  for (const Copy& copy : current->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  current->copies.clear();
}

unsigned cluster_rank() { return blockIdx.x % cluster_blocks; }

void wait_for_grid() {
  if (!cooperative_launch) refuse("grid.sync in a launch that is not cooperative");
  current->site = __builtin_return_address(0);
  leave(Wait::kGrid);
}

int exchange(unsigned mask, int value, int lanes) {
  Thread& self = *current;
  self.site = __builtin_return_address(0);
  self.mask = mask;
  self.value = value;
  self.lanes = lanes;
  leave(Wait::kExchange);
  return self.value;
}

void refuse(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  if (current == nullptr) {
    std::fprintf(stderr, "cuda emulation: %s\n", text);
    std::abort();
  }
  refusal = text;
  _longjmp(scheduler, 1);
}

}  // namespace emulation

// What -fsanitize=alignment calls: hardware faults on such an access.
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};
}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1_abort(const Place* place, uintptr_t address) {
  emulation::refuse("%s:%u: misaligned access to %#zx", place->file, place->line, static_cast<size_t>(address));
}
