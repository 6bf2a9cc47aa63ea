// Drivers of bias + GELU and of AdamW.
#pragma once
#include "driver.h"

namespace vit {

void gelu_forward(Gelu a, DType type, Param bias, int threads);
void gelu_backward(Gelu a, DType type, Param bias, Output grad_bias, int threads);
void adamw(AdamW a, int64_t size, DType grad_type, DType model_type, int threads);

}  // namespace vit
