// Feature maps of linear attention, one token at a time, and their gradients. All map to numbers >= 0.
//   elu      x + 1 where x > 0, else exp(x)
//   relu     u = max(0, x)
//   focused  |u| u^p / |u^p|  (Han et al. 2023, FLatten Transformer): relu's length, the direction sharpened. Computed on u / max(u),
//            whose powers neither overflow nor all vanish; zero where u is (or is below the smallest normal number).
#pragma once
#include "../linear_attention_args.h"
#include "columns.h"
#include "math.h"

namespace {

inline F relu(F x) { return max(set1(0), x); }  // NaN goes through

inline F power(F x, int p) {
  F y = x;
  for (int i = 1; i < p; ++i) y = y * x;
  return y;
}

struct Length {
  float largest, inverse, ratio;  // max(u), 1 / max(u), |u| / max(u); inverse is 0 where u is
};

template <class T>
inline VIT_INLINE Length length(const T* x, int64_t n) {
  float largest = 0;
  F m = set1(0);
  columns(n, [&](int64_t i, auto kind) VIT_INLINE { m = max(m, relu(load(x + i, kind))); });
  alignas(64) float lanes[W];
  store(lanes, m);
  for (int i = 0; i < W; ++i) largest = lanes[i] > largest || lanes[i] != lanes[i] ? lanes[i] : largest;
  if (largest < 1.17549435e-38f) return {0, 0, 1};
  const F scale = set1(1.0f / largest);
  const float squares = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
    const F h = relu(load(x + i, kind)) * scale;
    return fma(h, h, acc);
  });
  return {largest, 1.0f / largest, __builtin_sqrtf(squares)};
}

template <class T>
void feature_row(const vit::LinearAttention& a, const T* x, float* out) {
  const int64_t n = a.dim;
  if (a.feature == vit::Feature::elu) {
    columns(n, [&](int64_t i, auto kind) VIT_INLINE {
      const F v = load(x + i, kind);
      store(out + i, select_gt0(v, v + set1(1.0f), exp(v)), kind);
    });
  } else if (a.feature == vit::Feature::relu) {
    columns(n, [&](int64_t i, auto kind) VIT_INLINE { store(out + i, relu(load(x + i, kind)), kind); });
  } else {
    const Length u = length(x, n);
    const F inverse = set1(u.inverse);
    const float squares = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
      const F w = power(relu(load(x + i, kind)) * inverse, a.power);
      store(out + i, w, kind);
      return fma(w, w, acc);
    });
    const F scale = set1(u.inverse == 0 ? 0.0f : u.largest * u.ratio / __builtin_sqrtf(squares));
    columns(n, [&](int64_t i, auto kind) VIT_INLINE { store(out + i, load(out + i, kind) * scale, kind); });
  }
}

// out = gradient by x, from the gradient g by the features and the features f
template <class T>
void feature_grad_row(const vit::LinearAttention& a, const T* x, const float* f, const float* g, T* out) {
  const int64_t n = a.dim;
  const F one = set1(1.0f), zero = set1(0);
  if (a.feature == vit::Feature::elu) {
    columns(n, [&](int64_t i, auto kind) VIT_INLINE {
      const F v = load(x + i, kind);
      store(out + i, load(g + i, kind) * select_gt0(v, one, load(f + i, kind)), kind);
    });
  } else if (a.feature == vit::Feature::relu) {
    columns(n, [&](int64_t i, auto kind) VIT_INLINE {
      const F v = load(x + i, kind);
      store(out + i, select_gt0(v, load(g + i, kind), zero * relu(v)), kind);  // NaN goes through
    });
  } else {
    // f = |u| s, s = w/|w|, w = h^p, h = u/L, L = max(u), and s does not feel u's length:
    // df.g = (g.s) u/|u| + |u|/L p h^(p-1) (g - (g.s) s)/|w|
    const Length u = length(x, n);
    const F inverse = set1(u.inverse);
    float squares = 0, dot = 0;
    squares = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
      const F w = power(relu(load(x + i, kind)) * inverse, a.power);
      return fma(w, w, acc);
    });
    dot = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
      const F w = power(relu(load(x + i, kind)) * inverse, a.power);
      return fma(w, load(g + i, kind), acc);
    });
    const float m = u.inverse == 0 ? 0.0f : 1.0f / __builtin_sqrtf(squares);
    const F along = set1(dot * m / u.ratio), share = set1(dot * m * m), scale = set1(m * u.ratio);
    columns(n, [&](int64_t i, auto kind) VIT_INLINE {
      const F v = load(x + i, kind), h = relu(v) * inverse;
      const F below = a.power > 1 ? power(h, a.power - 1) : one;
      const F t = (load(g + i, kind) - below * h * share) * scale;
      const F d = fma(along, h, set1(float(a.power)) * below * t);
      store(out + i, select_gt0(v, d, zero * relu(v)), kind);  // NaN goes through
    });
  }
}

}  // namespace
