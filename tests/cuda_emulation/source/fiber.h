// Fibers: one stack per thread of a block, and the stack of the launch, from which they are entered.
#pragma once
#include <cstddef>
#include <vector>

namespace simt {

class Fibers {
 public:
  // Fiber `i` will start in `start`, which must end with `leave(true)`.
  void prepare(size_t i, void (*start)());
  // From the launch: runs fiber `i` until it leaves. From the fiber: back to the launch, for the last time if `forever`.
  void enter(size_t i);
  void leave(bool forever = false);
  void started();  // to be called first in `start`

 private:
  struct Fiber {
    char* stack;
    void* pointer;
    void* fake_stack;  // AddressSanitizer's
  };
  std::vector<Fiber> fibers_;
  size_t current_ = 0;
  void* launch_pointer_ = nullptr;
  void* launch_fake_stack_ = nullptr;
  const void* launch_bottom_ = nullptr;
  size_t launch_size_ = 0;
};

}  // namespace simt
