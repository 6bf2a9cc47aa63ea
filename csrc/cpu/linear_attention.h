// Drivers of linear attention. S: [batch, heads, dim, value_dim], z: [batch, heads, dim], both fp32 and kept for the backward pass.
#pragma once
#include "linear_attention_args.h"

namespace vit {

void linear_attention_forward(LinearAttention a, DType type, float* s, float* z, int threads);
void linear_attention_backward(LinearAttention a, DType type, const float* s, const float* z, int threads);

}  // namespace vit
