#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "report.h"
#include "shared.h"

namespace simt {
namespace {

constexpr size_t kSharedLimit = 48 << 10;  // bytes of shared memory that a block may declare

bool same(const Site& a, const Site& b) {
  return a.line == b.line && !std::strcmp(a.file, b.file) && !std::strcmp(a.operation, b.operation);
}

}  // namespace

Block block;

std::vector<int64_t> Sequence::of(int64_t count) {
  std::vector<int64_t> out(count);
  std::iota(out.begin(), out.end(), 0);
  if (order_ == Order::descending) std::reverse(out.begin(), out.end());
  if (order_ == Order::shuffled) std::shuffle(out.begin(), out.end(), random_);
  return out;
}

Block::Meeting& Block::Warp::meeting(unsigned mask) {
  for (Meeting& m : meetings)
    if (m.mask == mask) return m;
  return meetings.emplace_back(Meeting{.mask = mask});
}

std::string Block::run(int threads, void (*kernel)(const void*), const void* arguments, Sequence& sequence) {
  kernel_ = kernel, arguments_ = arguments;
  start(threads);
  for (int64_t i : sequence.of(threads)) ready_.push_back(int(i));
  while (!ready_.empty() && error_.empty()) {
    std::swap(ready_.front(), ready_[sequence.next(ready_.size())]);
    const int thread = ready_.front();
    ready_.pop_front();
    enter(thread);
  }
  if (error_.empty() && alive_) error_ = stuck();
  alive_ = 0;
  shared_.clear();
  return error_;
}

void Block::start(int threads) {
  threads_.assign(threads, Thread{});
  warps_.assign((threads + 31) / 32, Warp{});
  ready_.clear(), error_.clear();
  alive_ = threads, arrived_ = 0, epoch_ = 1, shared_size_ = 0;
  for (int i = 0; i < threads; ++i) {
    const unsigned n = unsigned(i);
    threads_[i].index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    warps_[i / 32].alive |= 1u << i % 32;
    fibers_.prepare(i, thread_main);
  }
}

void Block::enter(int thread) {
  threadIdx = threads_[thread].index;
  here = {epoch_, warps_[thread / 32].epoch, int16_t(thread), int16_t(thread / 32)};
  fibers_.enter(thread);
}

void Block::thread_main() {
  block.fibers_.started();
  block.kernel_(block.arguments_);
  block.end_thread();
  std::abort();
}

void Block::end_thread() {
  threads_[here.thread].done = true;
  --alive_;
  Warp& warp = warps_[here.warp];
  warp.alive &= ~(1u << here.thread % 32);
  for (Meeting& m : warp.meetings)  // those who wait need not wait for this one
    if (m.arrived && m.arrived == (m.mask & warp.alive)) finish_meeting(here.warp, m);
  if (arrived_ && arrived_ == alive_) finish_barrier();
  fibers_.leave(true);
}

void Block::give_up(std::string error) {
  error_ = std::move(error);
  fibers_.leave(true);
  std::abort();
}

void Block::barrier(const Site& site) {
  if (arrived_ && !same(barrier_, site)) fail("is at %s, others of its block at %s", name(site).c_str(), name(barrier_).c_str());
  barrier_ = site;
  if (++arrived_ == alive_) {
    finish_barrier();
  } else {
    threads_[here.thread].at_barrier = true;
    fibers_.leave();
  }
  here.block_epoch = epoch_;
}

void Block::finish_barrier() {
  ++epoch_;
  arrived_ = 0;
  for (int i = 0; i < int(threads_.size()); ++i)
    if (std::exchange(threads_[i].at_barrier, false)) ready_.push_back(i);
}

uint64_t Block::exchange(const Site& site, unsigned mask, uint64_t value, int from, unsigned* nonzero) {
  const int lane = here.thread % 32;
  Warp& warp = warps_[here.warp];
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %#x", name(site).c_str(), lane, mask);
  Meeting& m = warp.meeting(mask);
  if (m.arrived && !same(m.site, site)) fail("is at %s, other lanes of its warp at %s", name(site).c_str(), name(m.site).c_str());
  m.site = site;
  const int turn = m.turn;
  m.values[turn][lane] = value;
  m.arrived |= 1u << lane;
  if (m.arrived == (mask & warp.alive)) {
    finish_meeting(here.warp, m);
  } else {
    threads_[here.thread].waits_for = mask;
    fibers_.leave();
  }
  here.warp_epoch = warp.epoch;
  if (from >= 0 && !(m.present[turn] >> from & 1)) fail("%s: reads lane %d, which is not there", name(site).c_str(), from);
  for (int i = 0; nonzero && i < 32; ++i)
    if (m.present[turn] >> i & 1 && m.values[turn][i]) *nonzero |= 1u << i;
  return from >= 0 ? m.values[turn][from] : 0;
}

void Block::finish_meeting(int warp, Meeting& m) {
  m.present[m.turn] = m.arrived;
  m.turn ^= 1;
  m.arrived = 0;
  if (m.mask == 0xffffffffu && !std::strcmp(m.site.operation, "__syncwarp")) ++warps_[warp].epoch;  // shuffles order no memory
  for (int i = warp * 32; i < std::min(warp * 32 + 32, int(threads_.size())); ++i)
    if (threads_[i].waits_for == m.mask) {
      threads_[i].waits_for = 0;
      ready_.push_back(i);
    }
}

std::string Block::stuck() const {
  std::string out = "threads wait for others that never come:";
  int left = 4;
  for (int i = 0; i < int(threads_.size()) && left; ++i) {
    const Thread& t = threads_[i];
    if (t.done || (!t.at_barrier && !t.waits_for)) continue;
    Site site = barrier_;
    for (const Meeting& m : warps_[i / 32].meetings)
      if (t.waits_for == m.mask) site = m.site;
    out += (left-- < 4 ? ", thread " : " thread ") + std::to_string(i) + " at " + name(site);
  }
  return out;
}

void* Block::shared_array(int number, size_t bytes, size_t size) {
  std::unique_ptr<char[]>& array = shared_[number];
  if (!array) {
    array = std::make_unique<char[]>(bytes);
    shared_size_ += size;
    if (shared_size_ > kSharedLimit) fail("declares %zu bytes of shared memory; a block has %zu", shared_size_, kSharedLimit);
  }
  return array.get();
}

int new_array() {
  static int next = 0;
  return next++;
}
void* shared_array(int number, size_t bytes, size_t size) { return block.shared_array(number, bytes, size); }
void barrier(const Site& site) { block.barrier(site); }
uint64_t exchange(const Site& site, unsigned mask, uint64_t value, int from, unsigned* nonzero) {
  return block.exchange(site, mask, value, from, nonzero);
}

}  // namespace simt
