// Chooses the function table once, when the module is loaded.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "table.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vit {
namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
bool has_avx512bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Table* find_table(const char* name) {
#if defined(__x86_64__)
  if (!strcmp(name, "avx512bf16") && runs_avx512() && has_avx512bf16()) return table_avx512bf16();
  if (!strcmp(name, "avx512") && runs_avx512()) return table_avx512();
  if (!strcmp(name, "avx2") && runs_avx2()) return table_avx2();
#endif
  return strcmp(name, "baseline") ? nullptr : table_baseline();
}

const Table& table() {
  static const Table& chosen = []() -> const Table& {
    const char* wanted = getenv("VITRUVIUS_ISA");
    if (wanted && *wanted)
      if (const Table* t = find_table(wanted)) return *t;
    for (const char* name : {"avx512bf16", "avx512", "avx2"})
      if (const Table* t = find_table(name)) return *t;
    return *table_baseline();
  }();
  return chosen;
}

}  // namespace vit
