// What the CUDA kernels share: 16-byte accesses, reductions within a team of threads, stream-ordered scratch memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vit::cuda {

using bf16_t = __nv_bfloat16;
using f16_t = __half;

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(bf16_t a) { return __bfloat162float(a); }
__device__ inline float to_float(f16_t a) { return __half2float(a); }
__device__ inline void from_float(float a, float& out) { out = a; }
__device__ inline void from_float(float a, bf16_t& out) { out = __float2bfloat16_rn(a); }
__device__ inline void from_float(float a, f16_t& out) { out = __float2half_rn(a); }

// N elements that travel together: 16 bytes of the narrower type on the fast path, one element where rows are odd.
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T v[N];
};

template <class T, int N>
__device__ inline void load(const T* p, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(pack.v[i]);
}

template <class T, int N>
__device__ inline void store(T* p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) from_float(in[i], pack.v[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// A parameter vector of any of the three types (the branch is the same for every thread), or `absent` where there is none.
__device__ inline float param(Param p, int64_t i, float absent) {
  if (!p.data) return absent;
  if (p.type == DType::bf16) return to_float(static_cast<const bf16_t*>(p.data)[i]);
  if (p.type == DType::f16) return to_float(static_cast<const f16_t*>(p.data)[i]);
  return static_cast<const float*>(p.data)[i];
}

// Sum over a team of TEAM threads (32, or the whole block), the same in all of them, in a fixed order.
template <int TEAM>
__device__ inline float team_sum(float a) {
#pragma unroll
  for (int step = 16; step; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
  if constexpr (TEAM > 32) {
    __shared__ float warps[TEAM / 32];
    __syncthreads();  // the previous sum has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = a;
    __syncthreads();
    a = 0;
#pragma unroll
    for (int i = 0; i < TEAM / 32; ++i) a += warps[i];
  }
  return a;
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

// Scratch memory that lives until the work queued before its release is done. No synchronisation.
class Scratch {
 public:
  Scratch(int64_t floats, cudaStream_t stream) : stream_(stream) {
    if (floats) check(cudaMallocAsync(&data_, size_t(floats) * sizeof(float), stream), "scratch memory");
  }
  ~Scratch() {
    if (data_) cudaFreeAsync(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

// out[i] = sum over parts of partial[part * stride + i], i < dim, in order of the parts.
void reduce(const float* partial, int64_t parts, int64_t stride, int64_t dim, Output out, cudaStream_t stream);

}  // namespace vit::cuda
