#include "elementwise.h"

namespace vit {

void gelu_forward(Gelu a, DType type, Param bias, int threads) {
  std::vector<float> storage;
  a.bias = as_float(bias, a.dim, 0.0f, storage);
  a.stream = past_caches(a.y, a.rows * a.dim, a.dim, type) && past_caches(a.y, a.rows * a.dim, a.y_stride, type);
  const auto leaf = table().gelu_forward[int(type)];
  parallel_for(useful_threads(threads, a.rows * a.dim), a.rows, [&](int64_t begin, int64_t end, int) { leaf(a, begin, end); });
}

void gelu_backward(Gelu a, DType type, Param bias, Output grad_bias, int threads) {
  std::vector<float> storage;
  a.bias = as_float(bias, a.dim, 0.0f, storage);
  a.stream = past_caches(a.grad_input, a.rows * a.dim, a.dim, type);
  const auto leaf = table().gelu_backward[int(type)];
  a.chunk_rows = chunk_rows(a.rows, 1);
  const int64_t chunks = chunk_count(a.rows, a.chunk_rows);
  const Floats partial = floats(grad_bias.data ? chunks * a.dim : 0);
  a.partial = grad_bias.data ? partial.get() : nullptr;
  parallel_for(useful_threads(threads, a.rows * a.dim), chunks, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; ++chunk) leaf(a, chunk);
  });
  reduce(partial.get(), chunks, a.dim, a.dim, grad_bias, threads);
}

void adamw(AdamW a, int64_t size, DType grad_type, DType model_type, int threads) {
  const auto leaf = table().adamw[int(grad_type)][a.model_weight ? int(model_type) : 0];
  const int64_t block = 4096;  // a multiple of every vector
  a.stream = past_caches(a.model_weight, 8 * size, block, model_type);  // eight arrays take part
  const int64_t blocks = (size + block - 1) / block;
  parallel_for(useful_threads(threads, size), blocks, [&](int64_t begin, int64_t end, int) {
    leaf(a, begin * block, std::min(end * block, size));
  });
}

}  // namespace vit
