// Shared memory whose elements know who touched them last.
#pragma once
#include "thread.h"

namespace simt {

template <class T>
class Cell {
  T value_;
  mutable Place wrote_, read_;  // thread -1: several threads of the warp; warp -1: of several warps

  // Whether what happened at `before` is behind a barrier, or was this thread's own.
  static bool ordered(const Place& before) {
    return before.block_epoch != here.block_epoch || before.thread == here.thread ||
           (before.warp == here.warp && before.warp_epoch < here.warp_epoch);
  }
  void note_read() const {
    if (read_.block_epoch == here.block_epoch && read_.warp == -1) return;
    if (read_.block_epoch == here.block_epoch && read_.thread != here.thread) {
      read_.thread = -1;
      if (read_.warp != here.warp) read_.warp = -1;
      read_.warp_epoch = here.warp_epoch;
    } else {
      read_ = here;
    }
  }

 public:
  operator T() const {
    if (!wrote_.block_epoch) fail("reads shared memory that nothing wrote");
    if (!ordered(wrote_)) fail("race in shared memory: reads what thread %d wrote, with no barrier between", wrote_.thread);
    note_read();
    return value_;
  }
  Cell& operator=(T value) {
    if (wrote_.block_epoch && !ordered(wrote_))
      fail("race in shared memory: overwrites what thread %d wrote, with no barrier between", wrote_.thread);
    if (read_.block_epoch && !ordered(read_)) fail("race in shared memory: overwrites what another thread read, with no barrier between");
    wrote_ = here;
    value_ = value;
    return *this;
  }
  Cell& operator=(const Cell& other) { return *this = T(other); }
  Cell& operator+=(T b) { return *this = T(*this) + b; }
  Cell& operator-=(T b) { return *this = T(*this) - b; }
  Cell& operator*=(T b) { return *this = T(*this) * b; }
};

template <class T, size_t N>
class Array {
  T items_[N];

 public:
  T& operator[](int64_t i) {
    if (uint64_t(i) >= N) fail("index %ld of shared memory is not below %zu", long(i), N);
    return items_[i];
  }
};

template <class A>
struct Checked {
  using type = Cell<A>;
};
template <class A, size_t N>
struct Checked<A[N]> {
  using type = Array<typename Checked<A>::type, N>;
};

int new_array();
// The running block's array of that number: zeroed, which marks what nothing wrote. `size`: of it on a GPU.
void* shared_array(int number, size_t bytes, size_t size);

// One array per declaration, instantiation and block, as __shared__ means it; `Key` is the type of a lambda at the declaration.
template <class A, class Key>
auto& shared(Key) {
  using T = typename Checked<A>::type;
  static const int number = new_array();
  return *static_cast<T*>(shared_array(number, sizeof(T), sizeof(A)));
}

}  // namespace simt
