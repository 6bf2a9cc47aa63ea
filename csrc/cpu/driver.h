// What the drivers share.
#pragma once
#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "table.h"

namespace vit {

struct Param {  // a vector of `dim` elements, or absent
  const void* data;
  DType type;
};

struct Output {  // where a gradient goes, or null for nowhere
  void* data;
  DType type;
};

inline constexpr int64_t kMinWork = 16384;  // elements per thread below which a parallel region costs more than it saves
inline constexpr int64_t kPage = 4096;
inline constexpr int64_t kMinChunkRows = 64, kMaxChunks = 256;

inline int useful_threads(int threads, int64_t elements) {
  return int(std::clamp<int64_t>(elements / kMinWork, 1, std::max(threads, 1)));
}

// fp32 form of a parameter: itself where it is fp32 already, else widened into `storage`; `fill` where it is absent.
inline const float* as_float(Param p, int64_t dim, float fill, std::vector<float>& storage) {
  if (p.data && p.type == DType::f32) return static_cast<const float*>(p.data);
  storage.assign(size_t(dim), fill);
  if (p.data) table().widen(p.data, p.type, storage.data(), dim);
  return storage.data();
}

// out[i] = the sum over `parts` of partial[part * stride + i], i < dim
inline void reduce(const float* partial, int64_t parts, int64_t stride, int64_t dim, Output out, int threads) {
  if (!out.data) return;
  const int64_t block = 256, blocks = (dim + block - 1) / block;
  parallel_for(useful_threads(threads, parts * dim), blocks, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * block;
    ReducePartials r{partial, out.data, out.type, parts, stride, first, std::min(end * block, dim)};
    table().reduce_partials(r);
  });
}

// Rows per chunk of a backward pass: fixed by the number of rows, not of threads; a multiple of `step`.
inline int64_t chunk_rows(int64_t rows, int64_t step) {
  const int64_t wanted = std::max(kMinChunkRows, (rows + kMaxChunks - 1) / kMaxChunks);
  return (wanted + step - 1) / step * step;
}
inline int64_t chunk_count(int64_t rows, int64_t per_chunk) { return std::max<int64_t>(1, (rows + per_chunk - 1) / per_chunk); }

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(kPage)); }
};
using Floats = std::unique_ptr<float[], Free>;
inline Floats floats(int64_t n) {  // on a page boundary, left uninitialised
  return Floats(static_cast<float*>(::operator new[](size_t(n) * sizeof(float), std::align_val_t(kPage))));
}

// Scratch memory of each thread, on pages of its own: two threads that write to neighbouring lines slow each other down, and the
// prefetcher, which stops at pages, reads ahead into what the other one writes.
struct Scratch {
  int64_t stride;
  Floats data;
  Scratch(int threads, int64_t size) : stride((size + kPage / 4) / (kPage / 4) * (kPage / 4)), data(floats(threads * stride)) {}
  float* of(int thread) const { return data.get() + thread * stride; }
};

// Whether an output of `elements` outgrows the caches, so that reading its lines in before writing them is wasted; rows of `dim` must
// begin on vector boundaries.
inline bool past_caches(const void* out, int64_t elements, int64_t dim, DType type) {
  constexpr int64_t line = 64, large = 32 << 20;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % line == 0 && dim * size_of(type) % line == 0;
  return aligned && elements * size_of(type) >= large;
}

}  // namespace vit
