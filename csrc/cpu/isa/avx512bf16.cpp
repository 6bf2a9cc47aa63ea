#define VIT_AVX512_BF16
#include "../simd/avx512.h"
#include "../table.h"
#include "../leaf/fill_table.h"

namespace vit {
const Table* table_avx512bf16() {
  static const Table t = make_table("avx512bf16");
  return &t;
}
}  // namespace vit
