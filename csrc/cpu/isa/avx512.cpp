#include "../simd/avx512.h"
#include "../table.h"
#include "../leaf/fill_table.h"

namespace vit {
const Table* table_avx512() {
  static const Table t = make_table("avx512");
  return &t;
}
}  // namespace vit
