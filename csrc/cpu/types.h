// Element types that kernels read and write. Arithmetic inside is always fp32.
#pragma once
#include <cstdint>

namespace vit {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// s cdf(s), its approximation by tanh, and s sigmoid(1.702 s).
enum class GeluForm : int { erf = 0, tanh = 1, quick = 2 };

inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace vit
