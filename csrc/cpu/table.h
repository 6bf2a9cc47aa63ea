// The function table of one instruction set. Only these functions, and what they inline, use its instructions.
#pragma once
#include "args.h"
#include "linear_attention_args.h"
#include "mapped_attention_args.h"

namespace vit {

struct Table {
  const char* name;
  int width;  // floats per vector
  void (*widen)(const void* in, DType type, float* out, int64_t n);
  void (*reduce_partials)(const ReducePartials&);
  // Indexed [x_type][y_type]; null where that pair is not offered.
  void (*norm_forward[3][3])(const NormForward&, int64_t row_begin, int64_t row_end, int thread);
  void (*norm_backward[3][3])(const NormBackward&, int64_t chunk);
  void (*norm_backward_from_output[3][3])(const NormBackward&, int64_t chunk);
  // Indexed by element type.
  void (*gelu_forward[3])(const Gelu&, int64_t row_begin, int64_t row_end);
  void (*gelu_backward[3])(const Gelu&, int64_t chunk);
  // Indexed [gradient type][model weight type]; the latter is 0 where there are no model weights.
  void (*adamw[3][3])(const AdamW&, int64_t begin, int64_t end);
  using LinearAttentionFn = void (*)(const LinearAttention&, const LinearAttentionTask&);
  struct {
    LinearAttentionFn state, output, backward_q, backward_kv;
  } linear_attention[3];  // by element type
  struct {
    void (*pack)(const MappedAttention&, const MappedAttentionTask&);  // begin: the head
    void (*rows)(const MappedAttention&, const MappedAttentionTask&);
  } mapped_attention[3];  // by element type
};

const Table* table_baseline();
const Table* table_avx2();
const Table* table_avx512();
const Table* table_avx512bf16();

const Table& table();                   // the best one this processor runs, or the one VITRUVIUS_ISA names
const Table* find_table(const char*);   // null when the name is unknown or the processor cannot run it

}  // namespace vit
