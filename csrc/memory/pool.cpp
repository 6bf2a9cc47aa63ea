#include "pool.h"

#include <sys/mman.h>

#include <algorithm>

namespace vit {

namespace {

constexpr std::size_t kPage = 4096;
// The kernel allows a process some 65,000 mappings (vm.max_map_count). Beyond this many, free pages are given back rather
// than moved, which ends with fewer.
constexpr std::size_t kMostSeams = 16384;

void* pointer(std::uintptr_t a) { return reinterpret_cast<void*>(a); }

}  // namespace

void* Pool::take(std::size_t bytes) {
  const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
  if (size < bytes) return nullptr;
  const std::lock_guard guard(mutex_);
  Address block = carve(size);
  if (!block) block = assemble(size);
  if (!block) return nullptr;
  live_.emplace(block, size);
  counts_.live += size;
  return pointer(block);
}

bool Pool::give(void* block) {
  const std::lock_guard guard(mutex_);
  const auto found = live_.find(reinterpret_cast<Address>(block));
  if (found == live_.end()) return false;
  const auto [address, size] = *found;
  live_.erase(found);
  counts_.live -= size;
  add_free(address, size);
  return true;
}

void Pool::trim() {
  const std::lock_guard guard(mutex_);
  while (!free_.empty()) {
    const auto [address, size] = *free_.begin();
    remove_free(free_.begin());
    unmap(address, size);
  }
}

PoolCounts Pool::counts() {
  const std::lock_guard guard(mutex_);
  counts_.seams = seams_.size();
  return counts_;
}

// The start of the smallest free block that is large enough, or 0.
Pool::Address Pool::carve(std::size_t size) {
  const auto fit = by_size_.lower_bound({size, 0});
  if (fit == by_size_.end()) return 0;
  const auto [whole, address] = *fit;
  remove_free(free_.find(address));
  if (whole > size) add_free(address + size, whole - size);
  return address;
}

// A block at a new address of free pages, the largest free blocks first, since each costs a call, and of new ones where these
// do not suffice.
Pool::Address Pool::assemble(std::size_t size) {
  void* const mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return 0;
  const Address block = reinterpret_cast<Address>(mapped);
  seams_.insert(block);
  counts_.held += size;
  counts_.fresh += size;
  std::size_t done = 0;
  while (done < size && !free_.empty()) {
    const std::size_t rest = size - done;
    auto pick = by_size_.lower_bound({rest, 0});
    if (pick == by_size_.end()) --pick;
    const auto [whole, from] = *pick;
    const std::size_t part = std::min(whole, rest);
    remove_free(free_.find(from));
    if (whole > part) add_free(from + part, whole - part);
    move(from, part, block + done);
    done += part;
  }
  return block;
}

// The pages of free memory to where as much was mapped just now.
void Pool::move(Address from, std::size_t size, Address to) {
  const Address end = from + size;
  seams_.insert(end);
  while (from < end && seams_.size() < kMostSeams) {
    const auto next = seams_.upper_bound(from);
    const std::size_t part = *next - from;
    // Refused where there are too many mappings: then pages at both places are as they were.
    if (mremap(pointer(from), part, part, MREMAP_MAYMOVE | MREMAP_FIXED, pointer(to)) == MAP_FAILED) break;
    seams_.erase(from);
    seams_.insert(to), seams_.insert(to + part);
    counts_.held -= part;
    counts_.fresh -= part;
    counts_.moved += part;
    from += part, to += part;
  }
  if (from < end) unmap(from, end - from);
}

void Pool::unmap(Address from, std::size_t size) {
  munmap(pointer(from), size);
  seams_.erase(seams_.lower_bound(from), seams_.lower_bound(from + size));
  seams_.insert(from + size);
  counts_.held -= size;
}

void Pool::add_free(Address from, std::size_t size) {
  auto after = free_.upper_bound(from);
  if (after != free_.end() && after->first == from + size) {
    size += after->second;
    remove_free(after++);
  }
  after = free_.lower_bound(from);
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == from) {
      from = before->first, size += before->second;
      remove_free(before);
    }
  }
  free_.emplace(from, size);
  by_size_.emplace(size, from);
}

void Pool::remove_free(Sizes::iterator block) {
  by_size_.erase({block->second, block->first});
  free_.erase(block);
}

}  // namespace vit
