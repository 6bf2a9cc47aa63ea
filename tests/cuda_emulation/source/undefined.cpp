// UndefinedBehaviorSanitizer's reports, as errors of the emulator: what it calls begins with where it was called from. Compiled without it.
#include <cstdint>
#include <cstring>

#include "thread.h"

namespace {

struct Where {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void report(const Where& where, const char* what) {
  const char* slash = std::strrchr(where.file, '/');
  simt::fail("at %s:%u: %s", slash ? slash + 1 : where.file, where.line, what);
}

struct TypeMismatch {
  Where where;
  const void* type;
  unsigned char log_alignment, access;
};

}  // namespace

#define HANDLER(name, what) \
  extern "C" [[gnu::visibility("hidden")]] void __ubsan_handle_##name(const Where* where) { report(*where, what); }

HANDLER(add_overflow, "sum out of range")
HANDLER(sub_overflow, "difference out of range")
HANDLER(mul_overflow, "product out of range")
HANDLER(negate_overflow, "negation out of range")
HANDLER(divrem_overflow, "division by zero or out of range")
HANDLER(shift_out_of_bounds, "shift out of range")
HANDLER(out_of_bounds, "index out of bounds")
HANDLER(pointer_overflow, "pointer out of range")
HANDLER(load_invalid_value, "no value of its type")
HANDLER(float_cast_overflow, "floating-point value out of the integer's range")
HANDLER(vla_bound_not_positive, "array of no size")
HANDLER(nonnull_arg, "null argument")
HANDLER(nonnull_return_v1, "null result")
HANDLER(invalid_builtin, "no value for a builtin")
HANDLER(builtin_unreachable, "unreachable code reached")
HANDLER(missing_return, "no value returned")

extern "C" [[gnu::visibility("hidden")]] void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  const uintptr_t alignment = uintptr_t(1) << data->log_alignment;
  if (!pointer) report(data->where, "null pointer");
  report(data->where, pointer & (alignment - 1) ? "misaligned access" : "outside of the object");
}
