#include "../simd/avx2.h"
#include "../table.h"
#include "../leaf/fill_table.h"

namespace vit {
const Table* table_avx2() {
  static const Table t = make_table("avx2");
  return &t;
}
}  // namespace vit
