// What the pre-pass makes of kernel<<<grid, block, shared, stream>>>(arguments).
#pragma once
#include <type_traits>

#include "thread.h"

namespace simt {

struct Config {
  dim3 grid, block;
  size_t shared;  // must be 0: no kernel here uses dynamic shared memory
};
inline Config config(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr) { return {grid, block, shared}; }

void run(const char* where, const Config& config, void (*call)(const void*), const void* arguments);

template <class Kernel, class... Args>
void launch(const char* where, const Config& config, Kernel kernel, const Args&... args) {
  static_assert((std::is_trivially_copyable_v<Args> && ...), "kernel arguments are copied byte by byte");
  static_assert((sizeof(Args) + ... + 0) <= 4000, "kernel arguments: at most 4 KiB");
  auto bound = [&] { kernel(args...); };  // `kernel` takes its arguments by value: every thread has its own
  run(where, config, [](const void* f) { (*static_cast<const decltype(bound)*>(f))(); }, &bound);
}

inline int active_mutation = -1;
inline bool mutation(int number) { return number == active_mutation; }  // see mutations.py

}  // namespace simt
