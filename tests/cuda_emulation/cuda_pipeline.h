// Copies to shared memory that a thread waits for.
#pragma once

#include "scheduler.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::copy_later(to, from, bytes);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) { emulation::finish_copies(); }
