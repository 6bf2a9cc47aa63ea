#include "norm.h"

namespace vit {

void norm_forward(NormForward a, DType x_type, DType y_type, Param weight, Param bias, int threads) {
  const auto leaf = table().norm_forward[int(x_type)][int(y_type)];
  if (!leaf) throw std::invalid_argument("out_dtype: this pair of input and output types is not offered");
  std::vector<float> weight_storage, bias_storage;
  a.weight = as_float(weight, a.dim, 1.0f, weight_storage);
  a.bias = as_float(bias, a.dim, 0.0f, bias_storage);
  threads = useful_threads(threads, a.rows * a.dim);
  const Scratch scratch(threads, a.dim);
  a.scratch = scratch.data.get(), a.scratch_stride = scratch.stride;
  a.stream = past_caches(a.y, a.rows * a.dim, a.dim, y_type) && past_caches(a.sum, a.rows * a.dim, a.dim, x_type);
  parallel_for(threads, a.rows, [&](int64_t begin, int64_t end, int thread) { leaf(a, begin, end, thread); });
}

void norm_backward(NormBackward a, DType x_type, DType y_type, bool from_output, Param weight, Param bias, Output grad_weight,
                   Output grad_bias, int threads) {
  const Table& t = table();
  const auto leaf = (from_output ? t.norm_backward_from_output : t.norm_backward)[int(x_type)][int(y_type)];
  if (!leaf) throw std::invalid_argument("grad: this pair of input and gradient types is not offered");
  std::vector<float> weight_storage, bias_storage, inverse;
  a.weight = as_float(weight, a.dim, 1.0f, weight_storage);
  if (from_output) {
    a.bias = as_float(bias, a.dim, 0.0f, bias_storage);
    inverse.resize(size_t(a.dim));
    for (int64_t i = 0; i < a.dim; ++i) inverse[size_t(i)] = 1.0f / a.weight[i];
    a.inv_weight = inverse.data();
  }
  a.chunk_rows = chunk_rows(a.rows, 4);
  a.stream = past_caches(a.grad_input, a.rows * a.dim, a.dim, x_type);
  const int64_t chunks = chunk_count(a.rows, a.chunk_rows);
  const Floats partial = floats(chunks * 2 * a.dim);
  a.partial = partial.get();
  parallel_for(useful_threads(threads, a.rows * a.dim), chunks, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; ++chunk) leaf(a, chunk);
  });
  reduce(partial.get(), chunks, 2 * a.dim, a.dim, grad_weight, threads);
  reduce(partial.get() + a.dim, chunks, 2 * a.dim, a.dim, grad_bias, threads);
}

}  // namespace vit
