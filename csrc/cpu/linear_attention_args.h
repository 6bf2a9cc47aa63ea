// What the driver of linear attention hands to the leaf loops. See leaf/linear_attention.h for the mathematics.
#pragma once
#include <cstdint>

#include "types.h"

namespace vit {

enum class Feature : int { elu = 0, relu = 1, focused = 2 };

// [batch, heads, tokens, channels], channels contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct LinearAttention {
  Heads q, k, v, grad;              // grad only in the backward pass
  void *out, *grad_q, *grad_k, *grad_v;  // contiguous [batch, heads, tokens, channels]
  float* den;                       // [batch, heads, tokens]
  int64_t batch, heads, tokens, dim, value_dim;
  int64_t dim_pad, value_pad;       // rounded up to a multiple of 16, so that no product has a tail
  Feature feature;
  int power;                        // of the focused map
  float eps;
};

// One task: tokens [begin, end) of one head. All matrices here are fp32, padded with zeros.
struct LinearAttentionTask {
  int64_t head;                     // batch * heads + head
  int64_t begin, end;
  const float *s, *s_transposed;    // [dim_pad, value_pad] and its transpose: K'V, or its gradient
  const float* z;                   // [dim_pad]: sum of the keys' features, or its gradient
  float *s_sum, *z_sum;             // this task's share of a sum, added to
  float* scratch;
};

constexpr int64_t kLinearAttentionRows = 24;  // tokens per block: a multiple of the product's six rows

}  // namespace vit
