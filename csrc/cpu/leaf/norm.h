// LayerNorm and RMSNorm over the last dimension. RMSNorm is LayerNorm whose mean is 0, forward and backward.
//
// Forward keeps a row in the first-level cache: one pass for the mean, one for the variance about it (no cancellation, however far
// the mean is from zero), one to write. Half-precision rows are widened once, into fp32 scratch.
// Backward, with xh = (x - mean) rstd and g = dy weight:  dx = rstd (g - mean(g) - xh mean(g xh)); dweight = sum dy xh; dbias = sum dy.
// It walks four rows at once, so that the weight and the partial sums of the weight gradients are touched once per four rows.
#pragma once
#include "columns.h"

namespace {

template <class TX, class TY>
void norm_forward(const vit::NormForward& a, int64_t row_begin, int64_t row_end, int thread) {
  const int64_t n = a.dim;
  float* scratch = a.scratch + thread * a.scratch_stride;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const TX* x = (const TX*)a.x + a.x_rows.offset(row);
    TY* y = (TY*)a.y + a.y_rows.offset(row);
    const float* in = scratch;
    float mean = 0;
    if (a.residual) {
      const TX* residual = (const TX*)a.residual + row * n;
      TX* sum = (TX*)a.sum + row * n;
      mean = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
        const F v = round_to<TX>(take(x + i, kind) + take(residual + i, kind));
        put(sum + i, v, kind, a.stream);
        store(scratch + i, v, kind);
        return acc + v;
      });
    } else if constexpr (sizeof(TX) == 4) {
      in = x;
      if (a.mean) mean = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE { return acc + take(x + i, kind); });
    } else {
      mean = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
        const F v = take(x + i, kind);
        store(scratch + i, v, kind);
        return acc + v;
      });
    }
    mean = a.mean ? mean / float(n) : 0.0f;
    const F centre = set1(mean);
    const float squares = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
      const F d = keep(load(in + i, kind) - centre, kind);
      return fma(d, d, acc);
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(n) + a.eps);
    if (a.mean) a.mean[row] = mean;
    a.rstd[row] = rstd;
    const F scale = set1(rstd);
    columns(n, [&](int64_t i, auto kind) VIT_INLINE {
      const F xh = (load(in + i, kind) - centre) * scale;
      put(y + i, fma(xh, load(a.weight + i, kind), load(a.bias + i, kind)), kind, a.stream);
    });
  }
  if (a.stream) stream_fence();
}

// R rows at once. TS is the type of the saved tensor, TG of the incoming gradient, TX of the outgoing one.
template <class TX, class TG, bool FROM_OUTPUT, int R>
inline VIT_INLINE void norm_backward_rows(const vit::NormBackward& a, int64_t row, float* dweight, float* dbias) {
  using TS = std::conditional_t<FROM_OUTPUT, TG, TX>;
  const int64_t n = a.dim;
  const TS* saved[R];
  const TG* grad[R];
  TX* out[R];
  F centre[R], scale[R], sum_g[R], sum_gx[R];
  for (int r = 0; r < R; ++r) {
    saved[r] = (const TS*)a.saved + a.saved_rows.offset(row + r);
    grad[r] = (const TG*)a.grad + (row + r) * n;
    out[r] = (TX*)a.grad_input + a.out_rows.offset(row + r);
    centre[r] = set1(a.mean ? a.mean[row + r] : 0.0f);
    scale[r] = set1(a.rstd[row + r]);
    sum_g[r] = sum_gx[r] = set1(0);
  }
  const int64_t next_rows = a.saved_rows.offset(row + R) - a.saved_rows.offset(row);
  auto normalised = [&](int r, int64_t i, auto kind) VIT_INLINE {
    const F s = load(saved[r] + i, kind);
    if constexpr (FROM_OUTPUT)
      return (s - load(a.bias + i, kind)) * load(a.inv_weight + i, kind);
    else
      return (s - centre[r]) * scale[r];
  };
  columns(n, [&](int64_t i, auto kind) VIT_INLINE {
    const F w = load(a.weight + i, kind);  // 0 beyond a tail, and so is g
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(grad[r] + R * n + i);  // the next rows
      __builtin_prefetch(saved[r] + next_rows + i);
      const F g = load(grad[r] + i, kind) * w;
      sum_g[r] = sum_g[r] + g;
      sum_gx[r] = fma(g, keep(normalised(r, i, kind), kind), sum_gx[r]);
    }
  });
  F c1[R], c2[R];
  for (int r = 0; r < R; ++r) {
    c1[r] = set1(a.mean ? reduce_add(sum_g[r]) / float(n) : 0.0f);
    c2[r] = set1(reduce_add(sum_gx[r]) / float(n));
  }
  const TX* extra = a.grad_sum ? (const TX*)a.grad_sum + row * n : nullptr;
  columns(n, [&](int64_t i, auto kind) VIT_INLINE {
    const F w = load(a.weight + i, kind);
    F dw = load(dweight + i, kind), db = load(dbias + i, kind);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F dy = load(grad[r] + i, kind), xh = normalised(r, i, kind);
      dw = fma(dy, xh, dw);
      db = db + dy;
      F dx = scale[r] * (fma(dy, w, F{} - c1[r]) - xh * c2[r]);
      if (extra) dx = dx + load(extra + r * n + i, kind);
      put(out[r] + i, dx, kind, a.stream);
    }
    store(dweight + i, dw, kind);
    store(dbias + i, db, kind);
  });
}

template <class TX, class TG, bool FROM_OUTPUT>
void norm_backward(const vit::NormBackward& a, int64_t chunk) {
  float* dweight = a.partial + chunk * 2 * a.dim;
  float* dbias = dweight + a.dim;
  for (int64_t i = 0; i < 2 * a.dim; ++i) dweight[i] = 0;
  int64_t row = chunk * a.chunk_rows;
  const int64_t end = row + a.chunk_rows < a.rows ? row + a.chunk_rows : a.rows;
  for (; row + 4 <= end; row += 4) norm_backward_rows<TX, TG, FROM_OUTPUT, 4>(a, row, dweight, dbias);
  for (; row < end; ++row) norm_backward_rows<TX, TG, FROM_OUTPUT, 1>(a, row, dweight, dbias);
  if (a.stream) stream_fence();
}

}  // namespace
