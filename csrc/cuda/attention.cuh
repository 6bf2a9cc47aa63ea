// Device parts of linear attention: feature maps, and one tiled product that all six products of the algorithm go through.
#pragma once
#include <cfloat>

#include "common.cuh"

namespace vit::cuda {

// phi(x)[group, token, channel], evaluated as it is read. For the focused map `aux` holds 1/max(u), |u|/|w| and |u|/max(u) of each token
// (u = relu(x), w = (u/max(u))^power); the mathematics is that of csrc/cpu/leaf/features.h.
template <class T>
struct Features {
  const T* data;
  int64_t heads, batch_stride, head_stride, token_stride, tokens, dim;
  int map, power;
  const float* aux;  // [groups, tokens, 3], focused only

  __device__ float raw(int64_t group, int64_t token, int64_t c) const {
    return to_float(data[group / heads * batch_stride + group % heads * head_stride + token * token_stride + c]);
  }
  __device__ float raised(float h, int n) const {
    float y = 1;
    for (int i = 0; i < n; ++i) y *= h;
    return y;
  }
  __device__ float relu(float x) const { return x < 0 ? 0.0f : x; }  // NaN goes through
  __device__ float operator()(int64_t group, int64_t token, int64_t c) const {
    const float x = raw(group, token, c);
    if (map == 0) return x > 0 ? x + 1 : expf(x);
    if (map == 1) return relu(x);
    const float* a = aux + (group * tokens + token) * 3;
    return raised(relu(x) * a[0], power) * a[1];
  }
};

template <class T>
struct Values {  // plain elements of a strided [batch, heads, tokens, channels]
  Features<T> at;
  __device__ float operator()(int64_t group, int64_t token, int64_t c) const { return at.raw(group, token, c); }
};

template <class T>
struct ScaledGrad {  // dO / den
  Features<T> at;
  const float* den;
  __device__ float operator()(int64_t group, int64_t token, int64_t c) const {
    return at.raw(group, token, c) / den[group * at.tokens + token];
  }
};

struct Matrix {  // [groups, rows, cols] of fp32
  const float* data;
  int64_t rows, cols;
  __device__ float operator()(int64_t group, int64_t i, int64_t j) const { return data[(group * rows + i) * cols + j]; }
};

template <class A>
struct Transposed {
  A a;
  __device__ float operator()(int64_t group, int64_t i, int64_t j) const { return a(group, j, i); }
};

template <class A>
constexpr bool kRowsContiguous = true;  // whether neighbours along the second index are neighbours in memory
template <class A>
constexpr bool kRowsContiguous<Transposed<A>> = false;

// emit(group, chunk, i, j, sum over l of x(group, i, l) * y(group, l, j)), l in the chunk's part of [0, depth). Tiles of 64 x 64 by a block
// of 256 threads, 4 x 4 per thread. One dimension of blocks, since only that may be larger than 65535: column tiles, then row tiles, then
// groups * chunks.
template <class X, class Y, class Emit>
__global__ void __launch_bounds__(256) product_kernel(X x, Y y, Emit emit, int64_t rows, int64_t cols, int64_t depth, int64_t chunk_length, int chunks) {
  constexpr int TILE = 64, DEPTH = 16;
  __shared__ float xs[DEPTH][TILE + 1], ys[DEPTH][TILE + 1];
  const unsigned col_tiles = unsigned((cols + TILE - 1) / TILE), row_tiles = unsigned((rows + TILE - 1) / TILE);
  const unsigned part = blockIdx.x / col_tiles / row_tiles;
  const int64_t group = part / chunks, chunk = part % chunks;
  const int64_t row0 = int64_t(blockIdx.x / col_tiles % row_tiles) * TILE, col0 = int64_t(blockIdx.x % col_tiles) * TILE;
  const int64_t begin = chunk * chunk_length, end = min(begin + chunk_length, depth);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sum[4][4] = {};
  for (int64_t l0 = begin; l0 < end; l0 += DEPTH) {
    for (int e = threadIdx.x; e < TILE * DEPTH; e += 256) {
      const int i = kRowsContiguous<X> ? e / DEPTH : e % TILE, lx = kRowsContiguous<X> ? e % DEPTH : e / TILE;
      xs[lx][i] = row0 + i < rows && l0 + lx < end ? x(group, row0 + i, l0 + lx) : 0.0f;
      const int j = kRowsContiguous<Y> ? e % TILE : e / DEPTH, ly = kRowsContiguous<Y> ? e / TILE : e % DEPTH;
      ys[ly][j] = col0 + j < cols && l0 + ly < end ? y(group, l0 + ly, col0 + j) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int l = 0; l < DEPTH; ++l)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += xs[l][ty + 16 * i] * ys[l][tx + 16 * j];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + ty + 16 * i, col = col0 + tx + 16 * j;
      if (row < rows && col < cols) emit(group, chunk, row, col, sum[i][j]);
    }
}

// aux of the focused map; a warp per token
template <class T>
__global__ void focus_kernel(Features<T> f, int64_t rows, float* aux) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t group = row / f.tokens, token = row % f.tokens;
  float largest = 0;
  for (int64_t c = lane; c < f.dim; c += 32) {
    const float u = f.relu(f.raw(group, token, c));
    largest = u > largest || u != u ? u : largest;
  }
  for (int step = 16; step; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, step);
    largest = other > largest || other != other ? other : largest;
  }
  const float inverse = largest < FLT_MIN ? 0.0f : 1.0f / largest;
  float squares = 0, powers = 0;  // of u / largest: extreme lengths would leave fp32's range, and high powers of u / |u|
  for (int64_t c = lane; c < f.dim; c += 32) {
    const float h = f.relu(f.raw(group, token, c)) * inverse, w = f.raised(h, f.power);
    squares += h * h;
    powers += w * w;
  }
  const float ratio = sqrtf(team_sum<32>(squares)), sharp = sqrtf(team_sum<32>(powers));
  if (lane == 0) {
    aux[row * 3] = inverse;
    aux[row * 3 + 1] = inverse == 0 ? 0.0f : largest * ratio / sharp;
    aux[row * 3 + 2] = ratio;
  }
}

// out[row] = a . z[group] + eps (z per group), or -(a . z[row]) / den[row] (z per row)
template <class T>
__global__ void row_dot_kernel(Features<T> a, const float* z, bool per_row, float eps, const float* den, float* out, int64_t rows) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  const int64_t group = row / a.tokens, token = row % a.tokens;
  float sum = 0;
  for (int64_t c = threadIdx.x % 32; c < a.dim; c += 32) sum += a(group, token, c) * z[(per_row ? row : group) * a.dim + c];
  sum = team_sum<32>(sum);
  if (threadIdx.x % 32 == 0) out[row] = per_row ? -sum / den[row] : sum + eps;
}

// partial[(group * chunks + chunk) * dim + c] = sum over the chunk's tokens of weight[token] * a[token, c]; weight 1 if null
template <class T>
__global__ void column_sum_kernel(Features<T> a, const float* weight, int64_t chunk_length, int chunks, float* partial) {
  const int64_t group = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t begin = chunk * chunk_length, end = min(begin + chunk_length, a.tokens);
  for (int64_t c = threadIdx.x; c < a.dim; c += blockDim.x) {
    float sum = 0;
    for (int64_t token = begin; token < end; ++token)
      sum += a(group, token, c) * (weight ? weight[group * a.tokens + token] : 1.0f);
    partial[blockIdx.x * a.dim + c] = sum;
  }
}

// Gradient by x, of g = da[row] + (weight[row] or 1) * z[group]; a warp per token
template <class T>
__global__ void feature_grad_kernel(Features<T> f, const float* da, const float* weight, const float* z, T* out, int64_t rows) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t group = row / f.tokens, token = row % f.tokens;
  const float w = weight ? weight[row] : 1.0f;
  auto grad = [&](int64_t c) { return da[row * f.dim + c] + w * z[group * f.dim + c]; };
  float inverse = 0, ratio = 1, m = 0, dot = 0;  // m = 1/|w|
  if (f.map == 2 && f.aux[row * 3] != 0) {
    inverse = f.aux[row * 3], ratio = f.aux[row * 3 + 2], m = f.aux[row * 3 + 1] * inverse / ratio;
    for (int64_t c = lane; c < f.dim; c += 32) dot += f.raised(f.relu(f.raw(group, token, c)) * inverse, f.power) * grad(c);
    dot = team_sum<32>(dot);
  }
  for (int64_t c = lane; c < f.dim; c += 32) {
    const float x = f.raw(group, token, c), g = grad(c);
    float d;
    if (f.map == 0) {
      d = g * (x > 0 ? 1.0f : expf(x));
    } else if (f.map == 1) {
      d = x > 0 ? g : 0.0f * f.relu(x);
    } else {
      const float h = f.relu(x) * inverse, below = f.raised(h, f.power - 1);
      d = x > 0 ? dot * m / ratio * h + f.power * below * (g - below * h * dot * m * m) * m * ratio : 0.0f * f.relu(x);
    }
    from_float(d, out[row * f.dim + c]);
  }
}

}  // namespace vit::cuda
