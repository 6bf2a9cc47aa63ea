// Runs tasks on the threads that torch uses.
#pragma once
#include <cstdint>

namespace vit {

// Splits [0, tasks) into at most `threads` contiguous ranges and calls fn(begin, end, thread) for each, at the same time.
using RangeFn = void (*)(void* context, int64_t begin, int64_t end, int thread);
void parallel_ranges(int threads, int64_t tasks, RangeFn fn, void* context);
const char* threading();  // "torch's OpenMP" or "own threads"

template <class Fn>
void parallel_for(int threads, int64_t tasks, Fn&& fn) {
  parallel_ranges(
      threads, tasks,
      [](void* context, int64_t begin, int64_t end, int thread) { (*static_cast<Fn*>(context))(begin, end, thread); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace vit
