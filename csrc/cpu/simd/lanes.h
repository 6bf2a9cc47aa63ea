// Which lanes of a vector an access is for, the same for every instruction set.
#pragma once
#include "../types.h"

namespace {

using vit::bf16;
using vit::f16;

struct Full {};
struct Tail {
  int n;  // 1 .. W-1 live lanes
};

}  // namespace
