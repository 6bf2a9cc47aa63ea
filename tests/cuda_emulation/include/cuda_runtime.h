// The part of the CUDA language and runtime that kernels here use, on a CPU. What a kernel of tomorrow uses and this lacks is an error of the
// compiler; it is added here.
#pragma once
#include <cmath>
#include <cstdlib>

#include "launch.h"
#include "meeting.h"
#include "shared.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define SIMT_HERE(operation) simt::Site{operation, __FILE__, __LINE__}
#define __syncthreads() simt::barrier(SIMT_HERE("__syncthreads"))
#define __syncwarp(...) simt::sync_warp(SIMT_HERE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) simt::shuffle_from(SIMT_HERE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle_xor(SIMT_HERE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle_by(SIMT_HERE("__shfl_down_sync"), 1, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle_by(SIMT_HERE("__shfl_up_sync"), -1, __VA_ARGS__)
#define __ballot_sync(mask, predicate) simt::ballot(SIMT_HERE("__ballot_sync"), mask, predicate)
#define __any_sync(mask, predicate) (simt::ballot(SIMT_HERE("__any_sync"), mask, predicate) != 0)

// Both types must be the same, as nvcc's overloads want it for 64-bit integers.
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidPitchValue = 12
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream);
