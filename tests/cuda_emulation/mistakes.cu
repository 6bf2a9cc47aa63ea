// Kernels with a mistake each, and two without: what the emulator must name, with its line. The comment behind the mistake's line names it.
// Usage: mistakes KERNEL
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

struct alignas(16) Four {
  float v[4];
};

__global__ void right(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float a = s[63 - threadIdx.x];
  for (int step = 16; step; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
  y[threadIdx.x] = a;
}
__global__ void right_in_a_warp(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void race_to_read(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[0];  // race in shared memory: reads what thread 0 wrote
}
__global__ void race_to_overwrite(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[0];
  if (threadIdx.x == 0) s[0] = 1;  // race in shared memory: overwrites what another thread read
}
__global__ void race_to_write(float* y) {
  __shared__ float s[2];
  s[threadIdx.x / 32] = threadIdx.x;  // race in shared memory: overwrites what thread 0 wrote
  y[threadIdx.x] = 0;
}
__global__ void race_in_a_warp(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  const float a = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // orders no memory
  y[threadIdx.x] = a + s[threadIdx.x ^ 1];                 // race in shared memory: reads what thread
}
__global__ void unwritten(float* y) {
  __shared__ float s[64];
  if (threadIdx.x) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];  // reads shared memory that nothing wrote
}
__global__ void two_barriers(float* y) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();  // is at __syncthreads of
  y[threadIdx.x] = 0;
}
__global__ void half_a_block(float* y) {
  if (threadIdx.x < 40)
    __syncthreads();  // threads wait for others that never come: thread 0 at __syncthreads of
  else
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
__global__ void two_shuffles(float* y) {
  if (threadIdx.x % 2)
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // is at __shfl_xor_sync of
  else
    y[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
}
__global__ void lane_that_left(float* y) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 16);  // reads lane 16, which is not there
}
__global__ void not_in_its_mask(float* y) {
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);  // is not in its own mask 0xffff
}
__global__ void beyond_shared(float* y) {
  __shared__ float s[64];
  s[threadIdx.x + 1] = 1;  // index 64 of shared memory is not below 64
  y[threadIdx.x] = 0;
}
__global__ void too_much_shared(float* y) {
  __shared__ float s[12289];  // declares 49156 bytes of shared memory
  s[threadIdx.x] = 1;
  y[threadIdx.x] = 0;
}
__global__ void beyond_global(float* y) {
  y[threadIdx.x + 1] = 0;  // heap-buffer-overflow
}
__global__ void given_back(float* y) {
  y[threadIdx.x] = 0;  // heap-use-after-free
}
__global__ void misaligned(float* y) {
  *reinterpret_cast<Four*>(y + 1) = Four{};  // misaligned access
}
__global__ void nothing(float*) {}

template <class Kernel>
cudaError_t launch(Kernel kernel, float* y, dim3 grid, dim3 threads) {
  kernel<<<grid, threads>>>(y);
  return cudaGetLastError();
}

int main(int, char** argv) {
#define NAMED(kernel) {#kernel, &kernel}
  const std::map<std::string, void (*)(float*)> kernels = {
      NAMED(right), NAMED(right_in_a_warp), NAMED(race_to_read), NAMED(race_to_overwrite), NAMED(race_to_write), NAMED(race_in_a_warp),
      NAMED(unwritten), NAMED(two_barriers), NAMED(half_a_block), NAMED(two_shuffles), NAMED(lane_that_left), NAMED(not_in_its_mask),
      NAMED(beyond_shared), NAMED(too_much_shared), NAMED(beyond_global), NAMED(given_back), NAMED(misaligned)};
  const std::map<std::string, std::pair<dim3, dim3>> sizes = {
      {"no_blocks", {0, 64}}, {"too_many_threads", {1, 2048}}, {"too_many_in_z", {dim3(1, 1, 65536), 32}}};
  const std::string name = argv[1];
  float* y = nullptr;
  if (cudaMallocAsync(reinterpret_cast<void**>(&y), 64 * sizeof(float), nullptr) != cudaSuccess) return 2;
  if (name == "given_back") cudaFreeAsync(y, nullptr);
  try {
    const auto size = sizes.find(name);
    const cudaError_t error = size == sizes.end() ? launch(kernels.at(name), y, 2, 64) : launch(nothing, y, size->second.first, size->second.second);
    std::printf("%s\n", cudaGetErrorString(error));
    if (name == "right") std::printf("%g %g\n", y[0], y[63]);
    return error != cudaSuccess;
  } catch (const std::runtime_error& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
}
