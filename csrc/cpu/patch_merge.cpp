// Gathers a block of rows into scratch memory that stays in cache, and runs the norm's leaf functions there.
#include "patch_merge.h"

#include <cstring>

namespace vit {
namespace {

// Calls copy(offset in x, offset in the merged row) for the four parts of a merged row; two neighbours of one image row lie side by
// side in x, but not in the merged row.
template <class Copy>
void parts(const PatchMerge& a, int64_t row, Copy copy) {
  const int64_t j = row % a.width, i = row / a.width % a.height, b = row / (a.width * a.height);
  const int64_t line = 2 * a.width * a.channels;
  const int64_t first = ((b * a.height + i) * 2) * line + 2 * j * a.channels;
  copy(first, 0);
  copy(first + line, a.channels);
  copy(first + a.channels, 2 * a.channels);
  copy(first + line + a.channels, 3 * a.channels);
}

void gather(const PatchMerge& a, DType type, int64_t begin, int64_t end, char* to) {
  const int64_t size = size_of(type), part = a.channels * size;
  for (int64_t row = begin; row < end; ++row, to += 4 * part)
    parts(a, row, [&](int64_t from, int64_t place) {
      std::memcpy(to + place * size, static_cast<const char*>(a.x) + from * size, size_t(part));
    });
}

void scatter(const PatchMerge& a, DType type, int64_t begin, int64_t end, const char* from) {
  const int64_t size = size_of(type), part = a.channels * size;
  for (int64_t row = begin; row < end; ++row, from += 4 * part)
    parts(a, row, [&](int64_t to, int64_t place) {
      std::memcpy(static_cast<char*>(a.grad_input) + to * size, from + place * size, size_t(part));
    });
}

}  // namespace

void patch_merge_forward(const PatchMerge& a, DType type, Param weight, Param bias, int threads) {
  const int64_t rows = a.batch * a.height * a.width, dim = 4 * a.channels, block = 4;
  std::vector<float> weight_storage, bias_storage;
  NormForward n{};
  n.weight = as_float(weight, dim, 1.0f, weight_storage);
  n.bias = as_float(bias, dim, 0.0f, bias_storage);
  n.dim = dim, n.eps = a.eps, n.x_rows = {dim}, n.y_rows = {dim};
  threads = useful_threads(threads, rows * dim);
  const Scratch scratch(threads, dim);
  n.scratch = scratch.data.get(), n.scratch_stride = scratch.stride;
  const Scratch gathered(threads, block * dim);
  const auto leaf = table().norm_forward[int(type)][int(type)];
  parallel_for(threads, rows, [&](int64_t begin, int64_t end, int thread) {
    char* mine = reinterpret_cast<char*>(gathered.of(thread));
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first);
      gather(a, type, first, first + count, mine);
      NormForward some = n;
      some.x = mine, some.y = static_cast<char*>(a.y) + first * dim * size_of(type);
      some.mean = a.mean + first, some.rstd = a.rstd + first;
      leaf(some, 0, count, thread);
    }
  });
}

void patch_merge_backward(const PatchMerge& a, DType type, Param weight, Output grad_weight, Output grad_bias, int threads) {
  const int64_t rows = a.batch * a.height * a.width, dim = 4 * a.channels;
  const int64_t per_chunk = chunk_rows(rows, 4), chunks = chunk_count(rows, per_chunk), block = 64;
  const Floats partial = floats(chunks * 2 * dim);
  std::vector<float> weight_storage;
  NormBackward n{};
  n.weight = as_float(weight, dim, 1.0f, weight_storage);
  n.dim = dim, n.saved_rows = {dim}, n.out_rows = {dim}, n.chunk_rows = block;
  threads = useful_threads(threads, rows * dim);
  const Scratch block_sum(threads, 2 * dim), merged(threads, block * dim), grads(threads, block * dim);
  const auto leaf = table().norm_backward[int(type)][int(type)];
  parallel_for(threads, chunks, [&](int64_t begin, int64_t end, int thread) {
    char* in = reinterpret_cast<char*>(merged.of(thread));
    char* out = reinterpret_cast<char*>(grads.of(thread));
    float* sum = block_sum.of(thread);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* total = partial.get() + chunk * 2 * dim;
      std::fill_n(total, 2 * dim, 0.0f);
      const int64_t last = std::min(rows, (chunk + 1) * per_chunk);
      for (int64_t first = chunk * per_chunk; first < last; first += block) {
        const int64_t count = std::min(block, last - first);
        gather(a, type, first, first + count, in);
        NormBackward some = n;
        some.rows = count, some.partial = sum, some.saved = in, some.grad_input = out;
        some.grad = static_cast<const char*>(a.grad) + first * dim * size_of(type);
        some.mean = a.mean + first, some.rstd = a.rstd + first;
        leaf(some, 0);
        for (int64_t i = 0; i < 2 * dim; ++i) total[i] += sum[i];
        scatter(a, type, first, first + count, out);
      }
    }
  });
  reduce(partial.get(), chunks, 2 * dim, dim, grad_weight, threads);
  reduce(partial.get() + dim, chunks, 2 * dim, dim, grad_bias, threads);
}

}  // namespace vit
