// One block: its threads as fibers, who waits for whom, its shared memory.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "meeting.h"

namespace simt {

enum class Order { ascending, descending, shuffled };

// In what order blocks and threads run where the kernel leaves it open.
class Sequence {
 public:
  explicit Sequence(Order order) : order_(order), random_(order == Order::shuffled ? 1 : 0) {}
  std::vector<int64_t> of(int64_t count);
  size_t next(size_t waiting) { return order_ == Order::shuffled ? random_() % waiting : 0; }

 private:
  Order order_;
  std::mt19937_64 random_;
};

class Block {
 public:
  // Runs all its threads to their end; answers what went wrong, "" if nothing did.
  std::string run(int threads, void (*kernel)(const void*), const void* arguments, Sequence& sequence);

  // For the running thread:
  void barrier(const Site& site);
  uint64_t exchange(const Site& site, unsigned mask, uint64_t value, int from, unsigned* nonzero);
  [[noreturn]] void give_up(std::string error);
  void* shared_array(int number, size_t bytes, size_t size);
  bool running() const { return alive_ > 0; }

 private:
  // Lanes of one mask that wait for each other; two sets of values, since a fast lane is at the next one while a slow one still reads.
  struct Meeting {
    unsigned mask, arrived = 0;
    Site site{};
    int turn = 0;
    uint64_t values[2][32] = {};
    unsigned present[2] = {};
  };
  struct Warp {
    unsigned alive = 0;
    uint32_t epoch = 1;
    std::deque<Meeting> meetings;  // a deque: references last
    Meeting& meeting(unsigned mask);
  };
  struct Thread {
    uint3 index;
    bool done = false, at_barrier = false;
    unsigned waits_for = 0;  // the mask of its meeting
  };

  static void thread_main();
  void start(int threads);
  void enter(int thread);
  void end_thread();
  void finish_barrier();
  void finish_meeting(int warp, Meeting& meeting);
  std::string stuck() const;

  Fibers fibers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::deque<int> ready_;
  std::map<int, std::unique_ptr<char[]>> shared_;
  size_t shared_size_ = 0;
  int alive_ = 0, arrived_ = 0;
  uint32_t epoch_ = 1;
  Site barrier_{};
  void (*kernel_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  std::string error_;
};

extern Block block;

}  // namespace simt
