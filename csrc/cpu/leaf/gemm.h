// Small fp32 matrix product whose operands lie in the first- or second-level cache: C += X Y, or, without ADD, C = X Y.
//   C[i * ldc + j] += sum over l of X[i * xi + l * xl] * Y[l * ldy + j];  i < rows, j < cols (a multiple of W), l < depth
// Tiles of six rows by kTileVectors vectors stay in registers.
#pragma once

namespace {

constexpr int kTileVectors = W == 16 ? 4 : 2;  // 24 of 32 registers for sums with AVX-512, 12 of 16 elsewhere

template <int ROWS, int VECTORS, bool ADD>
inline void gemm_tile(int64_t depth, const float* x, int64_t xi, int64_t xl, const float* y, int64_t ldy, float* c, int64_t ldc) {
  F sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = ADD ? load(c + i * ldc + j * W) : set1(0);
  for (int64_t l = 0; l < depth; ++l) {
    F row[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) row[j] = load(y + l * ldy + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const F a = set1(x[i * xi + l * xl]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = fma(a, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) store(c + i * ldc + j * W, sum[i][j]);
}

template <int VECTORS, bool ADD = true>
void gemm_columns(int64_t rows, int64_t depth, const float* x, int64_t xi, int64_t xl, const float* y, int64_t ldy, float* c,
                  int64_t ldc) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) gemm_tile<6, VECTORS, ADD>(depth, x + i * xi, xi, xl, y, ldy, c + i * ldc, ldc);
  for (; i + 4 <= rows; i += 4) gemm_tile<4, VECTORS, ADD>(depth, x + i * xi, xi, xl, y, ldy, c + i * ldc, ldc);
  for (; i + 2 <= rows; i += 2) gemm_tile<2, VECTORS, ADD>(depth, x + i * xi, xi, xl, y, ldy, c + i * ldc, ldc);
  for (; i < rows; ++i) gemm_tile<1, VECTORS, ADD>(depth, x + i * xi, xi, xl, y, ldy, c + i * ldc, ldc);
}

inline void gemm(int64_t rows, int64_t cols, int64_t depth, const float* x, int64_t xi, int64_t xl, const float* y, int64_t ldy,
                 float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + kTileVectors * W <= cols; j += kTileVectors * W)
    gemm_columns<kTileVectors>(rows, depth, x, xi, xl, y + j, ldy, c + j, ldc);
  for (; j < cols; j += W) gemm_columns<1>(rows, depth, x, xi, xl, y + j, ldy, c + j, ldc);
}

}  // namespace
