// Linear attention without mask (Katharopoulos et al. 2020): a = phi(Q), b = phi(K), S = b'V, z = sum of b, den = a.z + eps, O = a S / den.
// Backward: U = dO / den; dS = a'U; da0 = U S'; w = -(a.da0) / den (a.da0 is dO.O, so O need not be kept); dz = sum of w a; da = da0 + w z;
// dV = b dS; db = V dS' + dz. Kept for it: S, z, den. Features are computed again, 24 tokens at a time, and never stored.
#pragma once
#include "features.h"
#include "gemm.h"

namespace {

constexpr int64_t kRows = vit::kLinearAttentionRows;

template <class T>
inline const T* token_row(const vit::LinearAttention& a, const vit::Heads& h, int64_t head, int64_t token) {
  return (const T*)h.data + head / a.heads * h.batch_stride + head % a.heads * h.head_stride + token * h.token_stride;
}

inline void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// features of `rows` tokens, padded: [rows, dim_pad]
template <class T>
void feature_block(const vit::LinearAttention& a, const vit::Heads& h, int64_t head, int64_t token, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = a.dim; i < a.dim_pad; ++i) out[r * a.dim_pad + i] = 0;
    feature_row(a, token_row<T>(a, h, head, token + r), out + r * a.dim_pad);
  }
}

// rows of V or dO as fp32, padded: [rows, value_pad]
template <class T>
void value_block(const vit::LinearAttention& a, const vit::Heads& h, int64_t head, int64_t token, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = a.value_dim; i < a.value_pad; ++i) out[r * a.value_pad + i] = 0;
    widen_array(token_row<T>(a, h, head, token + r), out + r * a.value_pad, a.value_dim);
  }
}

inline float dot(const float* x, const float* y, int64_t n) {
  return reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE { return fma(load(x + i, kind), load(y + i, kind), acc); });
}

template <class T>
void linear_attention_state(const vit::LinearAttention& a, const vit::LinearAttentionTask& t) {
  float *b = t.scratch, *v = b + kRows * a.dim_pad;
  for (int64_t token = t.begin; token < t.end; token += kRows) {
    const int64_t rows = t.end - token < kRows ? t.end - token : kRows;
    feature_block<T>(a, a.k, t.head, token, rows, b);
    value_block<T>(a, a.v, t.head, token, rows, v);
    gemm(a.dim_pad, a.value_pad, rows, b, 1, a.dim_pad, v, a.value_pad, t.s_sum, a.value_pad);
    for (int64_t r = 0; r < rows; ++r)
      columns(a.dim_pad, [&](int64_t i, auto) VIT_INLINE { store(t.z_sum + i, load(t.z_sum + i) + load(b + r * a.dim_pad + i)); });
  }
}

template <class T>
void linear_attention_output(const vit::LinearAttention& a, const vit::LinearAttentionTask& t) {
  float *f = t.scratch, *o = f + kRows * a.dim_pad;
  for (int64_t token = t.begin; token < t.end; token += kRows) {
    const int64_t rows = t.end - token < kRows ? t.end - token : kRows;
    feature_block<T>(a, a.q, t.head, token, rows, f);
    fill_zero(o, rows * a.value_pad);
    gemm(rows, a.value_pad, a.dim_pad, f, a.dim_pad, 1, t.s, a.value_pad, o, a.value_pad);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = t.head * a.tokens + token + r;
      const float den = dot(f + r * a.dim_pad, t.z, a.dim_pad) + a.eps;
      a.den[place] = den;
      const F scale = set1(1.0f / den);
      const float* from = o + r * a.value_pad;
      T* out = (T*)a.out + place * a.value_dim;
      columns(a.value_dim, [&](int64_t i, auto kind) VIT_INLINE { store(out + i, load(from + i, kind) * scale, kind); });
    }
  }
}

// dQ, and this task's share of dS and dz
template <class T>
void linear_attention_backward_q(const vit::LinearAttention& a, const vit::LinearAttentionTask& t) {
  const int64_t dim = a.dim_pad;
  float *f = t.scratch, *u = f + kRows * dim, *df = u + kRows * a.value_pad;
  for (int64_t token = t.begin; token < t.end; token += kRows) {
    const int64_t rows = t.end - token < kRows ? t.end - token : kRows;
    const float* den = a.den + t.head * a.tokens + token;
    feature_block<T>(a, a.q, t.head, token, rows, f);
    value_block<T>(a, a.grad, t.head, token, rows, u);
    for (int64_t r = 0; r < rows; ++r) {
      const F scale = set1(1.0f / den[r]);
      columns(a.value_pad, [&](int64_t i, auto) VIT_INLINE {
        store(u + r * a.value_pad + i, load(u + r * a.value_pad + i) * scale);
      });
    }
    fill_zero(df, rows * dim);
    gemm(rows, dim, a.value_pad, u, a.value_pad, 1, t.s_transposed, dim, df, dim);
    gemm(dim, a.value_pad, rows, f, 1, dim, u, a.value_pad, t.s_sum, a.value_pad);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = df + r * dim;
      const F w = set1(-dot(f + r * dim, row, dim) / den[r]);
      columns(dim, [&](int64_t i, auto) VIT_INLINE {
        store(t.z_sum + i, fma(w, load(f + r * dim + i), load(t.z_sum + i)));
        store(row + i, fma(w, load(t.z + i), load(row + i)));
      });
      T* out = (T*)a.grad_q + (t.head * a.tokens + token + r) * a.dim;
      feature_grad_row(a, token_row<T>(a, a.q, t.head, token + r), f + r * dim, row, out);
    }
  }
}

// dK and dV, from the whole dS and dz
template <class T>
void linear_attention_backward_kv(const vit::LinearAttention& a, const vit::LinearAttentionTask& t) {
  const int64_t dim = a.dim_pad;
  float *b = t.scratch, *v = b + kRows * dim, *db = v + kRows * a.value_pad, *dv = db + kRows * dim;
  for (int64_t token = t.begin; token < t.end; token += kRows) {
    const int64_t rows = t.end - token < kRows ? t.end - token : kRows;
    feature_block<T>(a, a.k, t.head, token, rows, b);
    value_block<T>(a, a.v, t.head, token, rows, v);
    for (int64_t r = 0; r < rows; ++r) widen_array(t.z, db + r * dim, dim);
    fill_zero(dv, rows * a.value_pad);
    gemm(rows, dim, a.value_pad, v, a.value_pad, 1, t.s_transposed, dim, db, dim);
    gemm(rows, a.value_pad, dim, b, dim, 1, t.s, a.value_pad, dv, a.value_pad);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = t.head * a.tokens + token + r;
      feature_grad_row(a, token_row<T>(a, a.k, t.head, token + r), b + r * dim, db + r * dim, (T*)a.grad_k + place * a.dim);
      T* out = (T*)a.grad_v + place * a.value_dim;
      columns(a.value_dim, [&](int64_t i, auto kind) VIT_INLINE { store(out + i, load(dv + r * a.value_pad + i, kind), kind); });
    }
  }
}

}  // namespace
