// How the rows of a divergence are laid out on a GPU: blocks, threads and shared memory, from the sizes alone.
//
//   tile       up to 64 classes: a block stages as many rows as it has threads, so that memory is read and written in
//              order; then a thread a row
//   staged     longer rows: both rows of a pair lie in shared memory while the sweeps go over them, each logit read once;
//              in that of one block, or of the 2, 4 or 8 blocks of a cluster (compute capability 9.0 and later), a slice
//              each
//   streamed   rows that do not fit there: each sweep reads them again, from L2 where that holds them
//
// Plain C++: the launcher asks, and so does `python -m alum_kernels plan`, which needs neither nvcc nor a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/divergence.h"

namespace alum::cuda {

// What of a device decides: cudaDeviceGetAttribute tells.
struct Machine {
  int capability = 0;            // 10 major + minor
  int64_t shared_per_block = 0;  // bytes that a block may opt in to
  int multiprocessors = 0;
};

enum class RowPath : int { kTile = 0, kStaged = 1, kStreamed = 2 };

struct RowPlan {
  RowPath path = RowPath::kTile;
  int threads = 0;           // of a block
  int blocks_per_row = 1;    // more than one: a cluster of as many
  int rows_per_block = 1;    // more than one: a tile
  int64_t side_bytes = 0;    // of either of the two logits that a block stages
  int64_t shared_bytes = 0;  // of a block, with the room of the reductions
  int resident = 0;          // blocks that a multiprocessor can hold
};

// ---- what kernels and plan agree on ----

constexpr int kMostRowThreads = 768;  // 80 registers a thread on every architecture
constexpr int kMostRowBlocks = 8;     // the largest cluster that every device from 9.0 on grants
constexpr int kRowFields = 8;         // room for as many sums

// Shared memory of a block of a longer row begins with what its reductions need: the partials of each warp, those of
// each block of the row (twice, taking turns), and the result. The staged slice follows.
constexpr int64_t kPartialBytes = kMostRowThreads / 32 * kRowFields * sizeof(double);
constexpr int64_t kSlotBytes = kMostRowBlocks * kRowFields * sizeof(double);
constexpr int64_t kResultBytes = 64;
constexpr int64_t kRoomBytes = kPartialBytes + 2 * kSlotBytes + kResultBytes;

// Elements from one row of a tile to the next: an odd number of 32-bit words, so that the threads of a warp, a row each,
// read from 32 banks.
ALUM_INLINE int tile_pitch(int columns, int element_bytes) {
  if (element_bytes == 4) return columns | 1;
  const int words = (columns + 1) / 2;
  return 2 * (words | 1);
}

// ---- the choice ----

constexpr int64_t kWordBytes = 16;            // of one access
constexpr int64_t kReservedBytes = 1024;      // of shared memory, taken by the system for each block
constexpr int kRegisters = 65536;             // of a multiprocessor
constexpr int kRowRegisters = 80;             // of a thread of a longer row, at most
constexpr int kTileRegisters = 40;            // of a thread of a tile, at most
constexpr int64_t kLeastSliceColumns = 2048;  // below, the barriers of a further block cost more than it brings

inline int resident_blocks(const Machine& machine, int64_t shared_bytes, int threads, int registers) {
  const int64_t by_shared = (machine.shared_per_block + kReservedBytes) / (shared_bytes + kReservedBytes);
  return static_cast<int>(std::min<int64_t>(by_shared, kRegisters / (threads * registers)));
}

inline RowPlan plan_short_rows(int64_t columns, int element_bytes, const Machine& machine) {
  RowPlan plan;
  plan.threads = plan.rows_per_block = columns <= 32 ? 128 : 64;
  plan.side_bytes =
      static_cast<int64_t>(plan.threads) * tile_pitch(static_cast<int>(columns), element_bytes) * element_bytes;
  // where each row of the tile begins on either side
  plan.shared_bytes = 2 * plan.threads * static_cast<int64_t>(sizeof(int64_t)) + 2 * plan.side_bytes;
  plan.resident = resident_blocks(machine, plan.shared_bytes, plan.threads, kTileRegisters);
  return plan;
}

// A row in one block, if a multiprocessor holds two such blocks: one waits for memory while the other computes.
// Otherwise, where there are clusters, in the fewest blocks of which that is true; if it is of none, in the fewest that
// hold it; streamed where eight do not. Rows too few to occupy the device are split further. Without clusters a row has
// one block, however few the rows are.
inline RowPlan plan_long_rows(int64_t columns, int element_bytes, int64_t rows, const Machine& machine) {
  const int64_t pack = kWordBytes / element_bytes;
  // a row may begin anywhere in a word: up to pack - 1 places before it are padding
  const int64_t packs = (columns + 2 * pack - 2) / pack;
  const auto side = [&](int blocks) { return (packs + blocks - 1) / blocks * kWordBytes; };
  const auto fitting = [&](int blocks) {
    return (machine.shared_per_block + kReservedBytes) / (kRoomBytes + 2 * side(blocks) + kReservedBytes);
  };
  const int most = machine.capability >= 90 ? kMostRowBlocks : 1;
  int blocks = 0;
  for (int wanted = 2; wanted >= 1 && blocks == 0; --wanted) {
    for (int n = most; n >= 1 && fitting(n) >= wanted; n /= 2) blocks = n;
  }
  const bool staged = blocks > 0;
  if (!staged) blocks = 1;
  while (blocks < most && rows * blocks < machine.multiprocessors && columns / (2 * blocks) >= kLeastSliceColumns) {
    blocks *= 2;
  }

  RowPlan plan;
  plan.path = staged ? RowPath::kStaged : RowPath::kStreamed;
  plan.blocks_per_row = blocks;
  const int64_t slice = (columns + blocks - 1) / blocks;
  if (slice <= 1024) {
    plan.threads = 128;
  } else if (staged) {
    // as many as leave registers for the blocks that shared memory has room for
    plan.threads = fitting(blocks) >= 3 ? 256 : fitting(blocks) == 2 ? 384 : kMostRowThreads;
  } else {
    // the fewer rows are under way, the more of them L2 holds
    plan.threads = slice <= 8192 ? 256 : kMostRowThreads;
  }
  plan.side_bytes = staged ? side(blocks) : 0;
  plan.shared_bytes = kRoomBytes + 2 * plan.side_bytes;
  plan.resident = resident_blocks(machine, plan.shared_bytes, plan.threads, kRowRegisters);
  return plan;
}

inline RowPlan plan_rows(int64_t columns, int element_bytes, int64_t rows, const Machine& machine) {
  return columns <= kExactColumns ? plan_short_rows(columns, element_bytes, machine)
                                  : plan_long_rows(columns, element_bytes, rows, machine);
}

}  // namespace alum::cuda
