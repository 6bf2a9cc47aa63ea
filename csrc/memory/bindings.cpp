// Large CPU tensors of the running torch come from a Pool: its allocator of CPU memory is replaced, by torch's own way for
// that (c10::SetCPUAllocator). The one file that reads a torch header, and so a module of its own, for one version of torch.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <pybind11/pybind11.h>

#include "pool.h"

namespace py = pybind11;
using namespace vit;

namespace {

// Smaller blocks would lose more than a few per cent to whole pages, and come and go more often than they are filled.
constexpr std::size_t kLarge = 64 << 10;

Pool& pool() {
  // Never destroyed: tensors are freed until the last moment of a process.
  static Pool* const only = new Pool;
  return *only;
}

void free_block(void* block) {
  if (!block) return;
  c10::profiledCPUMemoryReporter().Delete(block);
  if (!pool().give(block)) c10::free_cpu(block);
}

class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    void* block = bytes >= kLarge ? pool().take(bytes) : nullptr;
    if (!block) block = c10::alloc_cpu(bytes);  // which says why, where there is no memory at all
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &free_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

// AddressSanitizer sees the ends of blocks of malloc, not of these.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

bool install() {
  static PoolAllocator* const only = [] {
    pthread_atfork([] { pool().lock().lock(); }, [] { pool().lock().unlock(); }, [] { pool().lock().unlock(); });
    return new PoolAllocator;
  }();
  c10::SetCPUAllocator(only, /*priority=*/1);
  return c10::GetCPUAllocator() == only;
}

py::dict counts() {
  const PoolCounts found = pool().counts();
  py::dict named;
  named["live"] = found.live, named["held"] = found.held, named["moved"] = found.moved, named["fresh"] = found.fresh;
  named["seams"] = found.seams;
  return named;
}

}  // namespace

PYBIND11_MODULE(_memory, m) {
  m.doc() = "Vitruvius memory of CPU tensors";
  m.attr("torch_version") = VITRUVIUS_TORCH_VERSION;
  m.attr("sanitized") = kSanitized;
  m.def("install", &install, "Whether tensors come from the pool from now on.");
  m.def("trim", [] { pool().trim(); }, "Gives free pages back.");
  m.def("counts", &counts, "Bytes: live, held, moved and fresh so far; seams is a number.");
}
