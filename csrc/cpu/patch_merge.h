// 2x2 patch merge: four neighbouring tokens side by side, and the LayerNorm over them.
#pragma once
#include "driver.h"

namespace vit {

// x: [batch, 2 * height, 2 * width, channels], dense; y: [batch, height, width, 4 * channels]. Order of the four: (row, column) =
// (0, 0), (1, 0), (0, 1), (1, 1), as in the Swin Transformer.
struct PatchMerge {
  const void* x;
  void* y;
  const void* grad;
  void* grad_input;
  float *mean, *rstd;  // [batch, height, width]
  int64_t batch, height, width, channels;
  float eps;
};

void patch_merge_forward(const PatchMerge& a, DType type, Param weight, Param bias, int threads);
void patch_merge_backward(const PatchMerge& a, DType type, Param weight, Output grad_weight, Output grad_bias, int threads);

}  // namespace vit
