// Where threads wait for each other: barriers of a block, shuffles and votes of a warp.
#pragma once
#include <cstring>

#include "thread.h"

namespace simt {

struct Site {  // of a call in a kernel
  const char *operation, *file;
  int line;
};

void barrier(const Site& site);

// All lanes of `mask` leave a value. Answers what lane `from` left (0 where it is -1), and sets the bits of the lanes that left more than 0.
uint64_t exchange(const Site& site, unsigned mask, uint64_t value, int from, unsigned* nonzero = nullptr);

inline void sync_warp(const Site& site, unsigned mask = 0xffffffffu) { exchange(site, mask, 0, -1); }

inline unsigned ballot(const Site& site, unsigned mask, bool predicate) {
  unsigned lanes = 0;
  exchange(site, mask, predicate, -1, &lanes);
  return lanes;
}

// What lane `from` holds, where that is in this lane's part of `width` lanes; else this lane's own.
template <class T>
T shuffle(const Site& site, unsigned mask, T value, int from, int width) {
  static_assert(sizeof(T) <= 8);
  const int lane = here.thread % 32, first = lane / width * width;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(site, mask, bits, from >= first && from < first + width ? from : lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle_from(const Site& site, unsigned mask, T value, int from, int width = 32) {
  return shuffle(site, mask, value, here.thread % 32 / width * width + from % width, width);
}
template <class T>
T shuffle_xor(const Site& site, unsigned mask, T value, int with, int width = 32) {
  return shuffle(site, mask, value, here.thread % 32 ^ with, width);
}
template <class T>
T shuffle_by(const Site& site, int sign, unsigned mask, T value, unsigned lanes, int width = 32) {
  return shuffle(site, mask, value, here.thread % 32 + sign * int(lanes), width);
}

}  // namespace simt
