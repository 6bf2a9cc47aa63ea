// What the driver of attention with its map hands to the leaf loops. See leaf/mapped_attention.h for the way it goes.
#pragma once
#include <cstdint>

#include "linear_attention_args.h"  // Heads

namespace vit {

struct MappedAttention {
  Heads q, k, v, out;
  float* map;                         // [batch, tokens, tokens]
  float *keys, *values;               // of one image: [heads, tokens_pad * dim] and [heads, tokens * dim_pad], in panels
  int64_t batch, heads, tokens, dim;
  int64_t tokens_pad, dim_pad;        // rounded up to multiples of 64 and 16: of every instruction set's panels, and vectors
  int64_t score_stride;               // between rows of scores
  bool causal;
};

// One task: queries [begin, end) of an image, or the packing of one of its heads.
struct MappedAttentionTask {
  int64_t image, begin, end;
  float* scratch;                     // mapped_attention_scratch() numbers
};

constexpr int64_t kMappedAttentionRows = 48;  // queries per task at most

inline int64_t mapped_attention_scratch(const MappedAttention& a, int64_t rows) {
  return rows * (a.dim + a.score_stride + a.dim_pad);
}

}  // namespace vit
