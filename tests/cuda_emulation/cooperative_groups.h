// The grid barrier of a cooperative launch.
#pragma once

#include "scheduler.h"

namespace cooperative_groups {

struct grid_group {
  __forceinline__ void sync() const { emulation::wait_for_grid(); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
