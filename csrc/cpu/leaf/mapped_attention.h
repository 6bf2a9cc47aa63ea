// Softmax attention that gives the mean of its maps over heads beside its output: P = softmax(Q K' / sqrt(dim)), out = P V, map = mean of P.
// A fused kernel never has a whole row of P at hand. Here a task is a block of queries of one image, through all heads in turn: its
// scores [rows, tokens] and its rows of the map stay in the second-level cache, and the map is written to memory once. Keys, transposed,
// and values were packed in panels as wide as the product's tile, which stream past the block.
#pragma once
#include "columns.h"
#include "gemm.h"
#include "math.h"

namespace {

constexpr int64_t kPanel = kTileVectors * W;

template <class T>
inline const T* row_of(const vit::Heads& h, int64_t image, int64_t head, int64_t token) {
  return (const T*)h.data + image * h.batch_stride + head * h.head_stride + token * h.token_stride;
}

// One head of an image. Keys: panels of kPanel tokens, [dim, kPanel] each, zero past the last token. Values: panels of kPanel
// channels, then of W, [tokens, width] each, zero past the last channel.
template <class T>
void mapped_attention_pack(const vit::MappedAttention& a, const vit::MappedAttentionTask& t) {
  float *row = t.scratch, *keys = a.keys + t.begin * a.tokens_pad * a.dim, *values = a.values + t.begin * a.tokens * a.dim_pad;
  for (int64_t i = a.tokens / kPanel * kPanel * a.dim; i < a.tokens_pad * a.dim; ++i) keys[i] = 0;
  for (int64_t i = 0; i < a.dim_pad; ++i) row[i] = 0;
  for (int64_t token = 0; token < a.tokens; ++token) {
    float* lane = keys + token / kPanel * kPanel * a.dim + token % kPanel;
    widen_array(row_of<T>(a.k, t.image, t.begin, token), row, a.dim);
    for (int64_t i = 0; i < a.dim; ++i) lane[i * kPanel] = row[i];
    widen_array(row_of<T>(a.v, t.image, t.begin, token), row, a.dim);
    for (int64_t j = 0, width; j < a.dim_pad; j += width) {
      width = j + kPanel <= a.dim_pad ? kPanel : W;
      widen_array(row + j, values + j * a.tokens + token * width, width);
    }
  }
}

inline float largest(const float* x, int64_t n) {
  F a = set1(x[0]), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = max(load(x + i), a);
    b = max(load(x + i + W), b);
    c = max(load(x + i + 2 * W), c);
    d = max(load(x + i + 3 * W), d);
  }
  float lanes[W], top = x[0];
  store(lanes, max(max(a, b), max(c, d)));
  for (int j = 0; j < W; ++j) top = lanes[j] > top ? lanes[j] : top;
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// scores -> exp(scores - top), n of them, and zeros up to `limit`; returns 1 / their sum.
inline float exponentials(float* scores, int64_t n, int64_t limit) {
  const F top = set1(largest(scores, n));
  const float sum = reduce_columns(n, [&](F acc, int64_t i, auto kind) VIT_INLINE {
    const F e = keep(exp(load(scores + i, kind) - top), kind);
    store(scores + i, e, kind);
    return acc + e;
  });
  for (int64_t i = n; i < limit; ++i) scores[i] = 0;
  return 1.0f / sum;
}

template <class T>
void mapped_attention_rows(const vit::MappedAttention& a, const vit::MappedAttentionTask& t) {
  const int64_t rows = t.end - t.begin, limit = a.causal ? t.end : a.tokens, stride = a.score_stride;
  float *q = t.scratch, *scores = q + rows * a.dim, *out = scores + rows * stride, inverse[vit::kMappedAttentionRows];
  float* map = a.map + (t.image * a.tokens + t.begin) * a.tokens;
  const F scale = set1(1.0f / __builtin_sqrtf(float(a.dim)));
  for (int64_t i = 0; i < rows * a.tokens; ++i) map[i] = 0;
  for (int64_t head = 0; head < a.heads; ++head) {
    const float *keys = a.keys + head * a.tokens_pad * a.dim, *values = a.values + head * a.tokens * a.dim_pad;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = row_of<T>(a.q, t.image, head, t.begin + r);
      columns(a.dim, [&](int64_t i, auto kind) VIT_INLINE { store(q + r * a.dim + i, load(from + i, kind) * scale, kind); });
    }
    for (int64_t key = 0; key < limit; key += kPanel)
      gemm_columns<kTileVectors, false>(rows, a.dim, q, a.dim, 1, keys + key * a.dim, kPanel, scores + key, stride);
    for (int64_t r = 0; r < rows; ++r) {
      float *row = scores + r * stride, *to = map + r * a.tokens;
      const int64_t n = a.causal ? t.begin + r + 1 : a.tokens;
      inverse[r] = exponentials(row, n, limit);
      const F share = set1(inverse[r] / float(a.heads));
      columns(n, [&](int64_t i, auto kind) VIT_INLINE { store(to + i, fma(load(row + i, kind), share, load(to + i, kind)), kind); });
    }
    for (int64_t j = 0; j < a.dim_pad;) {
      const float* panel = values + j * a.tokens;
      if (j + kPanel <= a.dim_pad) {
        gemm_columns<kTileVectors, false>(rows, limit, scores, stride, 1, panel, kPanel, out + j, a.dim_pad);
        j += kPanel;
      } else {
        gemm_columns<1, false>(rows, limit, scores, stride, 1, panel, W, out + j, a.dim_pad);
        j += W;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F by = set1(inverse[r]);
      T* to = (T*)row_of<T>(a.out, t.image, head, t.begin + r);
      columns(a.dim, [&](int64_t i, auto kind) VIT_INLINE { store(to + i, load(out + r * a.dim_pad + i, kind) * by, kind); });
    }
  }
}

}  // namespace
