#include "fiber.h"

#include <sys/mman.h>

#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN_ONLY(call) call
#else
#define ASAN_ONLY(call)
#endif

#if !defined(__x86_64__)
#error "simt_switch is written for x86-64 alone"
#endif
// Saves what a callee must keep, changes stacks, and takes up what the other side saved.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStack = 128 << 10, kGuard = 4096, kSavedRegisters = 6;

char* new_stack() {
  void* p = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of a block");
  mprotect(p, kGuard, PROT_NONE);  // a thread that needs more ends here, and not in its neighbour's stack
  return static_cast<char*>(p) + kGuard;
}

}  // namespace

void Fibers::prepare(size_t i, void (*start)()) {
  while (fibers_.size() <= i) fibers_.push_back({new_stack(), nullptr, nullptr});
  Fiber& fiber = fibers_[i];
  ASAN_ONLY(__asan_unpoison_memory_region(fiber.stack, kStack));
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // the return address of `start`: whoever walks the stack ends there, and `start` finds it aligned as after a call
  *--top = reinterpret_cast<void*>(start);
  fiber.pointer = top - kSavedRegisters;
  fiber.fake_stack = nullptr;
}

void Fibers::enter(size_t i) {
  current_ = i;
  ASAN_ONLY(__sanitizer_start_switch_fiber(&launch_fake_stack_, fibers_[i].stack, kStack));
  simt_switch(&launch_pointer_, fibers_[i].pointer);
  ASAN_ONLY(__sanitizer_finish_switch_fiber(launch_fake_stack_, nullptr, nullptr));
}

void Fibers::started() { ASAN_ONLY(__sanitizer_finish_switch_fiber(nullptr, &launch_bottom_, &launch_size_)); }

void Fibers::leave([[maybe_unused]] bool forever) {
  Fiber& fiber = fibers_[current_];
  ASAN_ONLY(__sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, launch_bottom_, launch_size_));
  simt_switch(&fiber.pointer, launch_pointer_);
  ASAN_ONLY(__sanitizer_finish_switch_fiber(fiber.fake_stack, &launch_bottom_, &launch_size_));
}

}  // namespace simt
