// Norm of queries and keys per head, straight from and to the packed projection.
#pragma once
#include "driver.h"

namespace vit {

// packed: [tokens, 3, heads, dim], `token_stride` elements from token to token (what lies between is not touched).
struct QkNorm {
  void* packed;               // forward input; where q and k are null also the output: normalised in place
  void *q, *k, *v;            // [tokens, heads, dim]
  const void *grad_q, *grad_k, *grad_v;
  void* grad_packed;          // dense [tokens, 3, heads, dim]
  float *mean, *rstd;         // [2, tokens, heads]; mean null for RMSNorm
  int64_t tokens, heads, dim, token_stride;
  float eps;
};

void qk_norm_forward(const QkNorm& a, DType type, Param q_weight, Param k_weight, int threads);
void qk_norm_backward(const QkNorm& a, DType type, Param q_weight, Param k_weight, Output grad_q_weight, Output grad_k_weight,
                      int threads);

}  // namespace vit
