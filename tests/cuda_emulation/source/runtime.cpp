// Launches and the calls of the CUDA runtime: one device, whose memory is the process's and whose streams run at once.
#include "cuda_runtime.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "block.h"

namespace simt {
namespace {

struct Settings {
  int multiprocessors = 4;
  Order order = Order::ascending;
};

Settings settings;
cudaError_t last_error = cudaSuccess;
int64_t allocations = 0;

bool legal(const dim3& grid, const dim3& threads) {
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  return grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && count && count <= 1024 && threads.z <= 64;
}

}  // namespace

void run(const char* where, const Config& config, void (*call)(const void*), const void* arguments) {
  static std::mutex one_at_a_time;  // autograd launches from threads of its own
  const std::lock_guard lock(one_at_a_time);
  const dim3 grid = config.grid;
  if (config.shared) throw std::runtime_error(std::string("simt: ") + where + ": dynamic shared memory is not emulated");
  if (!legal(grid, config.block)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid, blockDim = config.block;
  Sequence sequence(settings.order);
  for (int64_t i : sequence.of(int64_t(grid.x) * grid.y * grid.z)) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    const std::string error = block.run(int(blockDim.x * blockDim.y * blockDim.z), call, arguments, sequence);
    if (error.empty()) continue;
    const std::string index = std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z);
    throw std::runtime_error("simt: " + error + " (in block " + index + " of the launch at " + where + ")");
  }
}

}  // namespace simt

// For tests.
#define EXPORTED extern "C" [[gnu::visibility("default")]]
EXPORTED void simt_configure(int multiprocessors, int order) { simt::settings = {multiprocessors, simt::Order(order)}; }
EXPORTED void simt_mutate(int number) { simt::active_mutation = number; }
EXPORTED int64_t simt_allocations() { return simt::allocations; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidPitchValue: return "invalid pitch argument";
    default: return "invalid argument";
  }
}
cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = simt::settings.multiprocessors, cudaSuccess; }

// Fresh memory holds NaN in every type: what reads it unwritten does not go unnoticed.
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) {
  if (posix_memalign(p, 256, bytes)) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);
  ++simt::allocations;
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return std::free(p), --simt::allocations, cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return std::memset(p, value, bytes), cudaSuccess; }
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t) {
  constexpr size_t limit = 0x7fffffff;
  if (width > to_pitch || width > from_pitch || to_pitch > limit || from_pitch > limit) return cudaErrorInvalidPitchValue;
  for (size_t i = 0; i < height; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  return cudaSuccess;
}
