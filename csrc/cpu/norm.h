// Drivers of the norms: scratch memory, threads, the two-stage reduction of the weight gradients.
#pragma once
#include "driver.h"

namespace vit {

void norm_forward(NormForward a, DType x_type, DType y_type, Param weight, Param bias, int threads);
// Writes grad_weight and grad_bias (either may be null).
void norm_backward(NormBackward a, DType x_type, DType y_type, bool from_output, Param weight, Param bias, Output grad_weight,
                   Output grad_bias, int threads);

}  // namespace vit
