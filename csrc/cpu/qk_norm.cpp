// Drives the norm's own leaf functions: a token's heads are a group of rows.
#include "qk_norm.h"

#include <cstring>

namespace vit {
namespace {

const char* at(const void* p, int64_t elements, DType type) { return static_cast<const char*>(p) + elements * size_of(type); }
char* at(void* p, int64_t elements, DType type) { return static_cast<char*>(p) + elements * size_of(type); }

}  // namespace

void qk_norm_forward(const QkNorm& a, DType type, Param q_weight, Param k_weight, int threads) {
  const int64_t width = a.heads * a.dim, rows = a.tokens * a.heads;
  const bool in_place = !a.q;
  std::vector<float> storage[2], no_bias(size_t(a.dim), 0.0f);
  NormForward norms[2]{};
  threads = useful_threads(threads, rows * a.dim);
  const Scratch scratch(threads, a.dim);
  for (int64_t i = 0; i < 2; ++i) {
    NormForward& n = norms[i];
    n.x = at(a.packed, i * width, type);
    n.y = in_place ? const_cast<void*>(n.x) : (i ? a.k : a.q);
    n.x_rows = {a.dim, a.heads, a.token_stride};
    n.y_rows = in_place ? n.x_rows : Rows{a.dim};
    n.weight = as_float(i ? k_weight : q_weight, a.dim, 1.0f, storage[i]);
    n.bias = no_bias.data();
    n.mean = a.mean ? a.mean + i * rows : nullptr;
    n.rstd = a.rstd + i * rows;
    n.rows = rows, n.dim = a.dim, n.eps = a.eps;
    n.scratch = scratch.data.get(), n.scratch_stride = scratch.stride;
  }
  const auto leaf = table().norm_forward[int(type)][int(type)];
  parallel_for(threads, a.tokens, [&](int64_t begin, int64_t end, int thread) {
    const int64_t block = 8;  // tokens: small enough that a block is read from memory once for q, k and v
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      for (const NormForward& n : norms) leaf(n, first * a.heads, last * a.heads, thread);
      if (in_place) continue;
      for (int64_t t = first; t < last; ++t)
        std::memcpy(at(a.v, t * width, type), at(a.packed, t * a.token_stride + 2 * width, type), size_t(width * size_of(type)));
    }
  });
}

void qk_norm_backward(const QkNorm& a, DType type, Param q_weight, Param k_weight, Output grad_q_weight, Output grad_k_weight,
                      int threads) {
  const int64_t width = a.heads * a.dim, rows = a.tokens * a.heads;
  const int64_t tokens_per_chunk = (chunk_rows(rows, 4) + a.heads - 1) / a.heads;
  const int64_t chunks = chunk_count(a.tokens, tokens_per_chunk);
  const Floats partial = floats(2 * chunks * 2 * a.dim);
  std::vector<float> storage[2];
  NormBackward norms[2]{};
  for (int64_t i = 0; i < 2; ++i) {
    NormBackward& n = norms[i];
    n.grad = i ? a.grad_k : a.grad_q;
    n.saved = at(a.packed, i * width, type);
    n.grad_input = at(a.grad_packed, i * width, type);
    n.saved_rows = {a.dim, a.heads, a.token_stride};
    n.out_rows = {a.dim, a.heads, 3 * width};
    n.weight = as_float(i ? k_weight : q_weight, a.dim, 1.0f, storage[i]);
    n.mean = a.mean ? a.mean + i * rows : nullptr;
    n.rstd = a.rstd + i * rows;
    n.partial = partial.get() + i * chunks * 2 * a.dim;
    n.rows = rows, n.dim = a.dim, n.chunk_rows = tokens_per_chunk * a.heads;
  }
  const auto leaf = table().norm_backward[int(type)][int(type)];
  parallel_for(useful_threads(threads, rows * a.dim), chunks, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (const NormBackward& n : norms) leaf(n, chunk);
      const int64_t last = std::min(a.tokens, (chunk + 1) * tokens_per_chunk);
      for (int64_t t = chunk * tokens_per_chunk; t < last; ++t)
        std::memcpy(at(a.grad_packed, t * 3 * width + 2 * width, type), at(a.grad_v, t * width, type), size_t(width * size_of(type)));
    }
  });
  reduce(norms[0].partial, chunks, 2 * a.dim, a.dim, grad_q_weight, threads);
  reduce(norms[1].partial, chunks, 2 * a.dim, a.dim, grad_k_weight, threads);
}

}  // namespace vit
