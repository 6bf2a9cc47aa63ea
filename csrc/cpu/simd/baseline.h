// Four floats by the compiler's own vector type: runs on every machine, x86 or not. Half precision is converted in integer
// arithmetic, so the result is the same bit for bit as the hardware conversions of the other instruction sets.
#pragma once
#include <cmath>
#include <cstring>

#include "lanes.h"

namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int W = 4;

inline F set1(float a) { return F{a, a, a, a}; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float reduce_add(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F reciprocal(F a) { return set1(1.0f) / a; }
inline F sqrt(F a) { return F{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
inline F blend_gt(F a, F b, F yes, F no) { return a > b ? yes : no; }
inline F abs(F a) {
  return (F)((I)a & 0x7fffffff);
}
inline F copysign(F magnitude, F sign) { return (F)(((I)magnitude & 0x7fffffff) | ((I)sign & (int32_t)0x80000000)); }
// 2^n for an n that is already a whole number in [-126, 127].
inline F exp2_int(F n) { return (F)((__builtin_convertvector(n, I) + 127) << 23); }
inline F round(F a) {
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: adding it drops the fraction
  return (a + magic) - magic;
}

inline float to_float(float a) { return a; }
inline float to_float(bf16 a) {
  uint32_t u = uint32_t(a.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float to_float(f16 a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000) << 16;
  const uint32_t exponent = (a.bits >> 10) & 31, mantissa = a.bits & 1023;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000 | (mantissa ? (mantissa << 13) | 0x400000 : 0);
  } else if (exponent == 0) {
    const float magnitude = float(mantissa) * 0x1p-24f;
    memcpy(&u, &magnitude, 4);
    u |= sign;
  } else {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline void from_float(float f, float* out) { *out = f; }
inline void from_float(float f, bf16* out) {
  uint32_t u;
  memcpy(&u, &f, 4);
  out->bits = (f != f) ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float f, f16* out) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00 | ((u >> 13) & 0x1ff));
  } else if (u >= 0x477ff000) {  // rounds to 65536 or more
    out->bits = uint16_t(sign | 0x7c00);
  } else if (u < 0x38800000) {  // below 2^-14: subnormal; adding 0.5 lines the bits up and rounds to nearest even
    float magnitude;
    memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    memcpy(&u, &magnitude, 4);
    out->bits = uint16_t(sign | (u - 0x3f000000));
  } else {
    out->bits = uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
  }
}

template <class T>
inline F load(const T* p, Full = {}) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline F load(const float* p, Full = {}) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline F load(const T* p, Tail t) {
  F v = set1(0);
  for (int i = 0; i < t.n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
inline void store(T* p, F v, Full = {}) {
  for (int i = 0; i < W; ++i) from_float(v[i], p + i);
}
inline void store(float* p, F v, Full = {}) { memcpy(p, &v, sizeof v); }
template <class T>
inline void store(T* p, F v, Tail t) {
  for (int i = 0; i < t.n; ++i) from_float(v[i], p + i);
}
template <class T>
inline void stream(T* p, F v, Full) {  // an ordinary store
  store(p, v);
}
inline void stream_fence() {}
inline F keep(F v, Full) { return v; }
inline F keep(F v, Tail t) {
  for (int i = t.n; i < W; ++i) v[i] = 0;
  return v;
}
template <class T>
inline F round_to(F v) {
  T out[W];
  store(out, v);
  return load(out);
}

}  // namespace
