// Sixteen floats, AVX-512 F+BW+DQ+VL; with VIT_AVX512_BF16 also the bf16 conversion instruction.
#pragma once
#include <immintrin.h>

#include "lanes.h"

namespace {

using F = __m512;
constexpr int W = 16;

inline __mmask16 lane_mask(Tail t) { return __mmask16((1u << t.n) - 1); }

inline F set1(float a) { return _mm512_set1_ps(a); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
// 1 / a for a in [2^-126, 2^126], to one unit in the last place: an estimate and a Newton step are faster than a division.
inline F reciprocal(F a) {
  const F r = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0f)), r, r);
}
inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
inline F blend_gt(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F copysign(F magnitude, F sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
}
// 2^n for an n that is already a whole number in [-126, 127].
inline F exp2_int(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F widen(__m256i h, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline F widen(__m256i h, f16) { return _mm512_cvtph_ps(h); }
inline __m256i narrow(F v, bf16) {
#ifdef VIT_AVX512_BF16
  return (__m256i)_mm512_cvtneps_pbh(v);  // reads and writes subnormals as zero, which the other paths keep
#else
  const __m512i u = _mm512_castps_si512(v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
#endif
}
inline __m256i narrow(F v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline F load(const float* p, Full = {}) { return _mm512_loadu_ps(p); }
inline F load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(lane_mask(t), p); }
inline void store(float* p, F v, Full = {}) { _mm512_storeu_ps(p, v); }
inline void store(float* p, F v, Tail t) { _mm512_mask_storeu_ps(p, lane_mask(t), v); }
template <class T>
inline F load(const T* p, Full = {}) {
  return widen(_mm256_loadu_si256((const __m256i*)p), T{});
}
template <class T>
inline F load(const T* p, Tail t) {
  return widen(_mm256_maskz_loadu_epi16(lane_mask(t), p), T{});
}
template <class T>
inline void store(T* p, F v, Full = {}) {
  _mm256_storeu_si256((__m256i*)p, narrow(v, T{}));
}
template <class T>
inline void store(T* p, F v, Tail t) {
  _mm256_mask_storeu_epi16(p, lane_mask(t), narrow(v, T{}));
}
// Past the caches, for what is not read again soon and lies on a vector boundary; stream_fence() ends a run of these.
inline void stream(float* p, F v, Full) { _mm512_stream_ps(p, v); }
template <class T>
inline void stream(T* p, F v, Full) {
  _mm256_stream_si256((__m256i*)p, narrow(v, T{}));
}
inline void stream_fence() { _mm_sfence(); }
inline F keep(F v, Full) { return v; }
inline F keep(F v, Tail t) { return _mm512_maskz_mov_ps(lane_mask(t), v); }
template <class T>
inline F round_to(F v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else
    return widen(narrow(v, T{}), T{});
}

}  // namespace
