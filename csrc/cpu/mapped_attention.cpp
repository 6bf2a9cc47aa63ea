// Image by image: all heads are packed, then blocks of queries run. A query's numbers depend on no other task: the same bits for any
// number of threads.
#include "mapped_attention.h"

#include "driver.h"

namespace vit {

void mapped_attention(MappedAttention a, DType type, int threads) {
  if (a.batch * a.heads * a.tokens == 0) return;
  a.tokens_pad = (a.tokens + 63) / 64 * 64, a.dim_pad = (a.dim + 15) / 16 * 16;
  a.score_stride = a.tokens_pad + 16;  // rows a power of two apart would share their places in the cache
  const Floats keys = floats(a.heads * a.tokens_pad * a.dim), values = floats(a.heads * a.tokens * a.dim_pad);
  a.keys = keys.get(), a.values = values.get();
  const int parts = useful_threads(threads, a.heads * a.tokens * a.dim);
  // As many queries as panels of keys are worth streaming past, but a block for each thread; whole tiles of the product.
  const int64_t rows = std::clamp<int64_t>((a.tokens + 6 * parts - 1) / (6 * parts) * 6, 6, kMappedAttentionRows);
  const int64_t blocks = (a.tokens + rows - 1) / rows;
  const Scratch scratch(parts, mapped_attention_scratch(a, rows));
  const auto& fn = table().mapped_attention[int(type)];
  for (int64_t image = 0; image < a.batch; ++image) {
    parallel_for(parts, a.heads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t head = begin; head < end; ++head) fn.pack(a, {image, head, head + 1, scratch.of(thread)});
    });
    parallel_for(parts, blocks, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t block = begin; block < end; ++block)
        fn.rows(a, {image, block * rows, std::min(a.tokens, (block + 1) * rows), scratch.of(thread)});
    });
  }
}

}  // namespace vit
