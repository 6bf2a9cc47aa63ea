// Which thread of which block runs, and how a kernel's mistake is reported. One block runs at a time, one thread of it at a time: these are
// plain variables.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef struct CUstream_st* cudaStream_t;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// Counts of what the running thread has waited for: they order its accesses to shared memory with those of others.
struct Place {
  uint32_t block_epoch, warp_epoch;  // from 1; of __syncthreads and of __syncwarp
  int16_t thread, warp;
};
inline Place here;

// Ends the launch; the caller of the launch gets a std::runtime_error with this text, and the line of the kernel that led here.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
