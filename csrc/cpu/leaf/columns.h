// Loops over one row. Everything here is in an unnamed namespace: each instruction set compiles its own copy, and the linker can
// never hand a machine the copy of another. For the same reason no standard-library template appears in leaf code.
#pragma once
#include <type_traits>  // compile-time only: it emits no code

#define VIT_INLINE __attribute__((always_inline))

namespace {

// fn(i, kind) for each vector of [0, n); kind is Full or Tail.
template <class Fn>
inline VIT_INLINE void columns(int64_t n, Fn fn) {
  int64_t i = 0;
  for (; i + W <= n; i += W) fn(i, Full{});
  if (i < n) fn(i, Tail{int(n - i)});
}

// Arrays that come from outside the first-level cache are asked for this many bytes ahead: the processor's own prefetcher stops at the
// end of each page, after one row of a small model. A third of the time of a cold GELU.
constexpr int64_t kAhead = 2048;

template <class T, class Kind>
inline VIT_INLINE F take(const T* p, Kind kind) {
  __builtin_prefetch((const char*)p + kAhead);
  return load(p, kind);
}

// Stores a result; past the caches if asked to.
template <class T, class Kind>
inline VIT_INLINE void put(T* p, F v, Kind kind, bool past_caches) {
  if constexpr (std::is_same_v<Kind, Full>)
    if (past_caches) return stream(p, v, kind);
  __builtin_prefetch((const char*)p + kAhead, 1);
  store(p, v, kind);
}

// acc = fn(acc, i, kind) for each vector, with four accumulators to hide the latency of the addition; returns their sum.
template <class Fn>
inline VIT_INLINE float reduce_columns(int64_t n, Fn fn) {
  F a = set1(0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = fn(a, i, Full{});
    b = fn(b, i + W, Full{});
    c = fn(c, i + 2 * W, Full{});
    d = fn(d, i + 3 * W, Full{});
  }
  for (; i + W <= n; i += W) a = fn(a, i, Full{});
  if (i < n) b = fn(b, i, Tail{int(n - i)});
  return reduce_add((a + b) + (c + d));
}

template <class T>
void widen_array(const T* in, float* out, int64_t n) {
  columns(n, [&](int64_t i, auto kind) VIT_INLINE { store(out + i, load(in + i, kind), kind); });
}

inline void widen_any(const void* in, vit::DType type, float* out, int64_t n) {
  if (type == vit::DType::f32) widen_array((const float*)in, out, n);
  if (type == vit::DType::bf16) widen_array((const bf16*)in, out, n);
  if (type == vit::DType::f16) widen_array((const f16*)in, out, n);
}

template <class T>
void reduce_partials_to(const vit::ReducePartials& a) {
  T* out = (T*)a.out + a.begin;
  const float* first = a.partial + a.begin;
  columns(a.end - a.begin, [&](int64_t i, auto kind) VIT_INLINE {
    F sum = load(first + i, kind);
    for (int64_t part = 1; part < a.parts; ++part) sum = sum + load(first + part * a.stride + i, kind);
    store(out + i, sum, kind);
  });
}

inline void reduce_partials_any(const vit::ReducePartials& a) {
  if (a.out_type == vit::DType::f32) reduce_partials_to<float>(a);
  if (a.out_type == vit::DType::bf16) reduce_partials_to<bf16>(a);
  if (a.out_type == vit::DType::f16) reduce_partials_to<f16>(a);
}

}  // namespace
