#pragma once

// Counters of host programs, in which one thing happens at a time: who has to wait is told so.
namespace cute_kernels::sm90 {

struct MustWait {};

inline void semaphore_wait(int const* counter, int value) {
  if (*counter != value) throw MustWait{};
}

inline void semaphore_advance(int* counter) { ++*counter; }

}  // namespace cute_kernels::sm90
