// Drivers of linear attention. S: [batch, heads, dim, value_dim], z: [batch, heads, dim], both fp32 and kept for the backward pass.
#pragma once
#include "linear_attention_args.h"

namespace vit {

void linear_attention_forward(LinearAttention a, DType type, float* s, float* z, int threads);
void linear_attention_backward(LinearAttention a, DType type, const float* s, const float* z, int threads);

// The same in four phases, for tokens that are split over ranks: the caller adds up S and z, and dS and dz, over ranks in between. Of `a`,
// each needs the sizes, the feature map, and what is named beside it; its results are the same bits as above.
void linear_attention_state(LinearAttention a, DType type, float* s, float* z, int threads);               // k, v
void linear_attention_output(LinearAttention a, DType type, const float* s, const float* z, int threads);  // q, eps -> out, den
void linear_attention_backward_q(LinearAttention a, DType type, const float* s, const float* z, float* ds, float* dz,
                                 int threads);  // grad, q, den -> grad_q
void linear_attention_backward_kv(LinearAttention a, DType type, const float* ds, const float* dz, int threads);  // k, v -> their gradients

}  // namespace vit
