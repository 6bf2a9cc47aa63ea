// The CUDA launchers, as the binding sees them: raw device pointers, sizes, types, a stream. The arguments mean what they mean in
// csrc/cpu; every launcher is asynchronous and throws std::runtime_error where the launch fails.
#pragma once
#include <cstdint>

#include "../cpu/types.h"

typedef struct CUstream_st* cudaStream_t;

namespace vit::cuda {

struct Param {
  const void* data;
  DType type;
};
struct Output {
  void* data;
  DType type;
};

// Where rows lie; `merge` > 0 makes a row four parts of `merge` elements each: a 2x2 patch merge of an image `width` merged rows wide.
struct Rows {
  int64_t stride, group_size, group_stride;
  int64_t merge, width;
};
inline Rows dense(int64_t dim) { return {dim, INT64_MAX, 0, 0, 0}; }

struct NormForward {
  const void *x, *residual;
  void *sum, *y;
  Param weight, bias;
  float *mean, *rstd;
  int64_t rows, dim;
  Rows x_rows, y_rows;
  float eps;
};

struct NormBackward {
  const void *grad, *saved, *grad_sum;
  void* grad_input;
  Param weight, bias;
  const float *mean, *rstd;
  int64_t rows, dim;
  Rows saved_rows, out_rows;
  bool from_output;
};

struct Gelu {
  const void *x, *grad;
  void *y, *grad_input;
  Param bias;
  int64_t rows, dim;
  int64_t x_stride, grad_stride, y_stride;  // between rows; those of grad_input are dense
  GeluForm form;
};

struct AdamW {
  float *weight, *moment, *square;
  const void* grad;
  void* model_weight;
  float decay, step_size, beta1, beta2, rest1, rest2, eps, root_correction, grad_scale;
};

// [batch, heads, tokens, channels], channels contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct LinearAttention {
  Heads q, k, v, grad;
  void *out, *grad_q, *grad_k, *grad_v;
  float* den;
  int64_t batch, heads, tokens, dim, value_dim;
  int feature, power;  // as in csrc/cpu/linear_attention_args.h
  float eps;
};

void linear_attention_forward(const LinearAttention& a, DType type, float* s, float* z, cudaStream_t stream);
void linear_attention_backward(const LinearAttention& a, DType type, const float* s, const float* z, cudaStream_t stream);
// The same in four phases, as in csrc/cpu/linear_attention.h.
void linear_attention_state(const LinearAttention& a, DType type, float* s, float* z, cudaStream_t stream);
void linear_attention_output(const LinearAttention& a, DType type, const float* s, const float* z, cudaStream_t stream);
void linear_attention_backward_q(const LinearAttention& a, DType type, const float* s, const float* z, float* ds, float* dz,
                                 cudaStream_t stream);
void linear_attention_backward_kv(const LinearAttention& a, DType type, const float* ds, const float* dz, cudaStream_t stream);
void norm_forward(const NormForward& a, DType x_type, DType y_type, cudaStream_t stream);
void norm_backward(const NormBackward& a, DType x_type, DType y_type, Output grad_weight, Output grad_bias, cudaStream_t stream);
void gelu_forward(const Gelu& a, DType type, cudaStream_t stream);
void gelu_backward(const Gelu& a, DType type, Output grad_bias, cudaStream_t stream);
void adamw(const AdamW& a, int64_t size, DType grad_type, DType model_type, cudaStream_t stream);
// `rows` rows of `bytes` bytes each, strides in bytes.
void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows, cudaStream_t stream);
int device_count();

}  // namespace vit::cuda
