// Memory for large blocks, such as tensors, that holds no more pages than were once in use at the same time.
//
// A free block serves the smallest request that it is large enough for (best fit, neighbours joined). Where none is large
// enough, glibc's heap would grow, which is how a process comes to hold twice its tensors. Here the pages of several
// free blocks are moved together to a new address (mremap): page tables change, no byte is copied, and no page is given to
// the kernel and faulted in again, which costs some 40 times as much. Only what free pages cannot cover is new.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace vit {

struct PoolCounts {
  std::size_t live;   // bytes in blocks that are in use, whole pages
  std::size_t held;   // bytes mapped: live blocks and free ones
  std::size_t moved;  // bytes moved to new addresses so far
  std::size_t fresh;  // bytes that the kernel was asked for so far
  std::size_t seams;  // places where mappings of the kernel may begin
};

class Pool {
 public:
  // Pages for `bytes`, or null where the kernel has none. Any thread may call; so for the others.
  void* take(std::size_t bytes);
  // Whether the block was of this pool, and is free now.
  bool give(void* block);
  // Gives all free pages back to the kernel.
  void trim();
  PoolCounts counts();
  // For pthread_atfork: a child must not inherit a lock that a thread which it has not got would open.
  std::mutex& lock() { return mutex_; }

 private:
  using Address = std::uintptr_t;
  using Sizes = std::map<Address, std::size_t>;

  Address carve(std::size_t size);
  Address assemble(std::size_t size);
  void move(Address from, std::size_t size, Address to);
  void unmap(Address from, std::size_t size);
  void add_free(Address from, std::size_t size);
  void remove_free(Sizes::iterator block);

  std::mutex mutex_;
  std::unordered_map<Address, std::size_t> live_;
  Sizes free_;                                          // by address, never two that touch
  std::set<std::pair<std::size_t, Address>> by_size_;   // the same
  std::set<Address> seams_;                             // where a mapping of the kernel begins: one mremap moves within one
  PoolCounts counts_{};
};

}  // namespace vit
