// The grid barrier of a cooperative launch, and the blocks of a cluster.
#pragma once

#include "scheduler.h"

namespace cooperative_groups {

struct grid_group {
  __forceinline__ void sync() const { emulation::wait_for_grid(); }
};

inline grid_group this_grid() { return {}; }

struct cluster_group {
  __forceinline__ void sync() const { emulation::wait_for_cluster(); }
  unsigned block_rank() const { return emulation::cluster_rank(); }

  template <class T>
  T* map_shared_rank(T* address, unsigned rank) const {
    return static_cast<T*>(emulation::map_shared(address, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
