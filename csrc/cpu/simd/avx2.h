// Eight floats, AVX2 + FMA + F16C.
#pragma once
#include <immintrin.h>

#include "lanes.h"

namespace {

using F = __m256;
constexpr int W = 8;

inline __m256i lane_mask(Tail t) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(t.n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F set1(float a) { return _mm256_set1_ps(a); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_add(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F reciprocal(F a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
inline F blend_gt(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline F abs(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
inline F copysign(F magnitude, F sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}
// 2^n for an n that is already a whole number in [-126, 127].
inline F exp2_int(F n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F widen(__m128i h, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline F widen(__m128i h, f16) { return _mm256_cvtph_ps(h); }
inline __m128i narrow(F v, bf16) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i narrow(F v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline F load(const float* p, Full = {}) { return _mm256_loadu_ps(p); }
inline F load(const float* p, Tail t) { return _mm256_maskload_ps(p, lane_mask(t)); }
inline void store(float* p, F v, Full = {}) { _mm256_storeu_ps(p, v); }
inline void store(float* p, F v, Tail t) { _mm256_maskstore_ps(p, lane_mask(t), v); }
template <class T>
inline F load(const T* p, Full = {}) {
  return widen(_mm_loadu_si128((const __m128i*)p), T{});
}
template <class T>
inline F load(const T* p, Tail t) {
  alignas(16) T buffer[W] = {};
  for (int i = 0; i < t.n; ++i) buffer[i] = p[i];
  return widen(_mm_load_si128((const __m128i*)buffer), T{});
}
template <class T>
inline void store(T* p, F v, Full = {}) {
  _mm_storeu_si128((__m128i*)p, narrow(v, T{}));
}
template <class T>
inline void store(T* p, F v, Tail t) {
  alignas(16) T buffer[W];
  _mm_store_si128((__m128i*)buffer, narrow(v, T{}));
  for (int i = 0; i < t.n; ++i) p[i] = buffer[i];
}
// Past the caches, for what is not read again soon and lies on a vector boundary; stream_fence() ends a run of these.
inline void stream(float* p, F v, Full) { _mm256_stream_ps(p, v); }
template <class T>
inline void stream(T* p, F v, Full) {
  _mm_stream_si128((__m128i*)p, narrow(v, T{}));
}
inline void stream_fence() { _mm_sfence(); }
inline F keep(F v, Full) { return v; }
inline F keep(F v, Tail t) { return _mm256_and_ps(v, _mm256_castsi256_ps(lane_mask(t))); }
template <class T>
inline F round_to(F v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else
    return widen(narrow(v, T{}), T{});
}

}  // namespace
