// Driver of softmax attention that gives the mean of its maps over heads, too. Of `a` it needs all but what is padded and packed.
#pragma once
#include "mapped_attention_args.h"

namespace vit {

void mapped_attention(MappedAttention a, DType type, int threads);

}  // namespace vit
