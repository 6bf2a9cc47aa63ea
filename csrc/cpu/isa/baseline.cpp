#include "../simd/baseline.h"
#include "../table.h"
#include "../leaf/fill_table.h"

namespace vit {
const Table* table_baseline() {
  static const Table t = make_table("baseline");
  return &t;
}
}  // namespace vit
