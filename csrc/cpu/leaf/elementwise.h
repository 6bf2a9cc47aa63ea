// bias + GELU, and AdamW over flat arrays.
#pragma once
#include "columns.h"
#include "math.h"

namespace {

using vit::GeluForm;

// gelu(s) and its derivative. erf form: s cdf(s). tanh form: s (1 + tanh(c (s + 0.044715 s^3))) / 2, c = sqrt(2 / pi). quick form:
// s sigmoid(c s), c = 1.702.
template <GeluForm FORM>
inline void gelu(F s, F& value, F& slope) {
  if constexpr (FORM == GeluForm::tanh) {
    const F square = s * s, half = set1(0.5f);
    const F inner = set1(0.797884561f) * fma(s * square, set1(0.044715f), s);
    const F t = tanh(inner);
    const F cdf = fma(t, half, half);
    value = s * cdf;
    const F inner_slope = set1(0.797884561f) * fma(square, set1(3 * 0.044715f), set1(1.0f));
    const F rest = (set1(1.0f) - t) * (set1(1.0f) + t);
    // far out the slope is 0 or 1; there s^2 may overflow and meet rest = 0
    const F bump = blend_gt(rest, set1(0), half * s * rest * inner_slope, set1(0));
    slope = cdf + bump;
  } else if constexpr (FORM == GeluForm::quick) {
    const F size = abs(s * set1(1.702f));  // |z|
    // exp(-|z|) = half^2, which underflows where its product with s, taken in two steps, does not
    const F half = blend_gt(size, set1(174.0f), set1(0), exp(size * set1(-0.5f))), tail = half * half;
    const F large = reciprocal(set1(1.0f) + tail), small = s * half * half * large;  // sigmoid(|z|); s sigmoid(-|z|)
    value = select_gt0(s, s * large, small);
    slope = fma(small * large, set1(1.702f), select_gt0(s, large, tail * large));
  } else {
    F cdf, density;
    normal(s, cdf, density);
    value = s * cdf;
    slope = fma(s, density, cdf);
  }
}

template <class T, GeluForm FORM>
void gelu_forward_rows(const vit::Gelu& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)a.x + row * a.x_stride;
    T* y = (T*)a.y + row * a.y_stride;
    columns(a.dim, [&](int64_t i, auto kind) VIT_INLINE {
      F value, slope;
      gelu<FORM>(take(x + i, kind) + load(a.bias + i, kind), value, slope);
      put(y + i, value, kind, a.stream);
    });
  }
  if (a.stream) stream_fence();
}

template <class T, GeluForm FORM>
void gelu_backward_rows(const vit::Gelu& a, int64_t begin, int64_t end, float* dbias) {
  for (int64_t row = begin; row < end; ++row) {
    const T *x = (const T*)a.x + row * a.x_stride, *grad = (const T*)a.grad + row * a.grad_stride;
    T* out = (T*)a.grad_input + row * a.dim;
    columns(a.dim, [&](int64_t i, auto kind) VIT_INLINE {
      F value, slope;
      gelu<FORM>(take(x + i, kind) + load(a.bias + i, kind), value, slope);
      const F d = take(grad + i, kind) * slope;
      put(out + i, d, kind, a.stream);
      if (dbias) store(dbias + i, load(dbias + i, kind) + d, kind);
    });
  }
  if (a.stream) stream_fence();
}

template <class T>
void gelu_forward(const vit::Gelu& a, int64_t begin, int64_t end) {
  switch (a.form) {
    case GeluForm::erf: return gelu_forward_rows<T, GeluForm::erf>(a, begin, end);
    case GeluForm::tanh: return gelu_forward_rows<T, GeluForm::tanh>(a, begin, end);
    case GeluForm::quick: return gelu_forward_rows<T, GeluForm::quick>(a, begin, end);
  }
}

template <class T>
void gelu_backward(const vit::Gelu& a, int64_t chunk) {
  float* dbias = a.partial ? a.partial + chunk * a.dim : nullptr;
  if (dbias)
    for (int64_t i = 0; i < a.dim; ++i) dbias[i] = 0;
  const int64_t begin = chunk * a.chunk_rows, end = begin + a.chunk_rows < a.rows ? begin + a.chunk_rows : a.rows;
  switch (a.form) {
    case GeluForm::erf: return gelu_backward_rows<T, GeluForm::erf>(a, begin, end, dbias);
    case GeluForm::tanh: return gelu_backward_rows<T, GeluForm::tanh>(a, begin, end, dbias);
    case GeluForm::quick: return gelu_backward_rows<T, GeluForm::quick>(a, begin, end, dbias);
  }
}

template <class TG, class TM>
void adamw(const vit::AdamW& a, int64_t begin, int64_t end) {
  const TG* grad = (const TG*)a.grad + begin;
  TM* model = a.model_weight ? (TM*)a.model_weight + begin : nullptr;
  float *weight = a.weight + begin, *moment = a.moment + begin, *square = a.square + begin;
  const F beta1 = set1(a.beta1), rest1 = set1(a.rest1), beta2 = set1(a.beta2), rest2 = set1(a.rest2);
  const F root = set1(a.root_correction), eps = set1(a.eps), size = set1(a.step_size), decay = set1(a.decay);
  const F scale = set1(a.grad_scale);
  columns(end - begin, [&](int64_t i, auto kind) VIT_INLINE {
    const F g = take(grad + i, kind) * scale;
    const F m = fma(take(moment + i, kind), beta1, g * rest1);
    const F v = fma(take(square + i, kind), beta2, g * g * rest2);
    const F divisor = min(set1(1e30f), fma(sqrt(v), root, eps));  // infinite where g^2 overflows: the step is 0 then
    const F w = take(weight + i, kind) * decay - size * m * reciprocal(divisor);
    store(moment + i, m, kind);
    store(square + i, v, kind);
    store(weight + i, w, kind);
    if (model) put(model + i, w, kind, a.stream);
  });
  if (a.stream) stream_fence();
}

}  // namespace
