// What the drivers hand to the leaf loops: plain structs of pointers and sizes. A null pointer switches the optional part off.
// Weights have been widened to fp32 by the driver.
#pragma once
#include <cstdint>

#include "types.h"

namespace vit {

// Where rows of contiguous elements lie, in elements: evenly spaced, or in evenly spaced groups (the heads of a token in a packed
// projection).
struct Rows {
  int64_t stride;
  int64_t group_size = INT64_MAX;  // rows per group
  int64_t group_stride = 0;
  int64_t offset(int64_t row) const { return row / group_size * group_stride + row % group_size * stride; }
};

// y = (s - mean) * rstd * weight + bias, s = x or x + residual; mean is 0 for RMSNorm.
struct NormForward {
  const void* x;         // [rows, dim] of x_type
  const void* residual;  // [rows, dim] of x_type, or null
  void* sum;             // [rows, dim] of x_type: x + residual, or null
  void* y;               // [rows, dim] of y_type
  const float* weight;   // [dim]
  const float* bias;     // [dim]
  float* mean;           // [rows], or null for RMSNorm
  float* rstd;           // [rows]
  float* scratch;        // [threads, padded dim]
  int64_t rows, dim, scratch_stride;
  Rows x_rows, y_rows;  // x_rows for x alone: residual and sum are dense
  float eps;
  bool stream;  // write y and sum past the caches
};

// One task of the backward pass is a fixed block of rows ("chunk"), whatever the number of threads: the partial sums, and so the
// weight gradients, do not depend on it.
struct NormBackward {
  const void* grad;           // [rows, dim] of y_type
  const void* saved;          // [rows, dim]: the input s (x_type), or the output y (y_type) when from_output
  const void* grad_sum;       // [rows, dim] of x_type, added to grad_input; or null
  void* grad_input;           // [rows, dim] of x_type
  const float* weight;        // [dim]
  const float* bias;          // [dim]; read only when from_output
  const float* mean;          // [rows], or null for RMSNorm
  const float* rstd;          // [rows]
  const float* inv_weight;    // [dim]; read only when from_output
  float* partial;             // [chunks, 2, dim]: sums for the weight and for the bias
  int64_t rows, dim, chunk_rows;
  Rows saved_rows, out_rows;  // out_rows for grad_input; grad and grad_sum are dense
  bool stream;                // write grad_input past the caches
};

// y = gelu(x + bias) over [rows, dim]; backward like a norm's, with partial sums [chunks, dim] for the bias. Rows of x, y and grad are
// a stride apart, those of grad_input dense.
struct Gelu {
  const void* x;
  const float* bias;  // [dim]
  void* y;            // forward
  const void* grad;   // backward
  void* grad_input;   // backward
  float* partial;     // backward
  int64_t rows, dim, chunk_rows;
  int64_t x_stride, y_stride, grad_stride;
  GeluForm form;
  bool stream;  // write y or grad_input past the caches
};

// One AdamW step (Loshchilov & Hutter 2019) over flat arrays; master weights and moments in fp32.
struct AdamW {
  float *weight, *moment, *square;
  const void* grad;
  void* model_weight;  // the same weights in the model's type, or null
  float decay;         // 1 - lr * weight_decay
  float step_size;     // lr / (1 - beta1^step)
  float beta1, beta2, rest1, rest2, eps;  // rest = 1 - beta, rounded once
  float root_correction;  // 1 / sqrt(1 - beta2^step)
  float grad_scale;       // what the gradient is multiplied by first
  bool stream;            // write model_weight past the caches
};

// out[i] = sum over parts of partial[part * stride + i], i in [begin, end)
struct ReducePartials {
  const float* partial;
  void* out;
  DType out_type;
  int64_t parts, stride, begin, end;
};

}  // namespace vit
