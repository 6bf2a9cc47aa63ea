// LayerNorm and RMSNorm; the mathematics is that of csrc/cpu/leaf/norm.h. A row belongs to a team: one warp for short rows, a block of
// 256 threads for long ones. The grid is persistent: each team walks over rows, and keeps its share of the weight gradients in a slice of
// scratch memory that is its own, so that no atomic is needed and the sums are the same in every run.
#include <algorithm>

#include "common.cuh"

namespace vit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpRow = 1024;  // up to this many elements a row is one warp's

__device__ inline int64_t row_start(const Rows& r, int64_t row) { return row / r.group_size * r.group_stride + row % r.group_size * r.stride; }

// Offset of element i (a multiple of the pack size, which divides `merge`) of a row.
__device__ inline int64_t element(const Rows& r, int64_t row, int64_t i) {
  if (!r.merge) return row_start(r, row) + i;
  const int64_t part = i / r.merge, line = 2 * r.width * r.merge;
  return row / r.width * 2 * line + row % r.width * 2 * r.merge + (part % 2) * line + (part / 2) * r.merge + i % r.merge;
}

template <class TX, class TY, int N, int TEAM>
__global__ void __launch_bounds__(kThreads) forward_kernel(NormForward a) {
  const int lane = threadIdx.x % TEAM;
  const int64_t teams = int64_t(gridDim.x) * (kThreads / TEAM);
  const TX* x = static_cast<const TX*>(a.x);
  TX* sum_out = static_cast<TX*>(a.sum);
  const float inverse = 1.0f / float(a.dim);
  for (int64_t row = int64_t(blockIdx.x) * (kThreads / TEAM) + threadIdx.x / TEAM; row < a.rows; row += teams) {
    // The row is read three times, the second and third from the first-level cache.
    float total = 0;
    for (int64_t i = lane * N; i < a.dim; i += TEAM * N) {
      float v[N];
      load<TX, N>(x + element(a.x_rows, row, i), v);
      if (a.residual) {
        float r[N];
        load<TX, N>(static_cast<const TX*>(a.residual) + row * a.dim + i, r);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] += r[j];
        store<TX, N>(sum_out + row * a.dim + i, v);
        load<TX, N>(sum_out + row * a.dim + i, v);  // as rounded; the same thread reads it again below
      }
#pragma unroll
      for (int j = 0; j < N; ++j) total += v[j];
    }
    const float mean = a.mean ? team_sum<TEAM>(total) * inverse : 0.0f;
    auto read = [&](int64_t i, float (&v)[N]) {
      if (a.residual)
        load<TX, N>(sum_out + row * a.dim + i, v);
      else
        load<TX, N>(x + element(a.x_rows, row, i), v);
    };
    float squares = 0;
    for (int64_t i = lane * N; i < a.dim; i += TEAM * N) {
      float v[N];
      read(i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) squares += (v[j] - mean) * (v[j] - mean);
    }
    const float rstd = 1.0f / sqrtf(team_sum<TEAM>(squares) * inverse + a.eps);
    if (lane == 0) {
      if (a.mean) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t i = lane * N; i < a.dim; i += TEAM * N) {
      float v[N];
      read(i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * rstd * param(a.weight, i + j, 1.0f) + param(a.bias, i + j, 0.0f);
      store<TY, N>(static_cast<TY*>(a.y) + element(a.y_rows, row, i), v);
    }
  }
}

template <class TX, class TG, bool FROM_OUTPUT, int N, int TEAM>
__global__ void __launch_bounds__(kThreads) backward_kernel(NormBackward a, float* partial) {
  using TS = std::conditional_t<FROM_OUTPUT, TG, TX>;
  const int lane = threadIdx.x % TEAM;
  const int64_t teams = int64_t(gridDim.x) * (kThreads / TEAM);
  const int64_t team = int64_t(blockIdx.x) * (kThreads / TEAM) + threadIdx.x / TEAM;
  float *dweight = partial + team * 2 * a.dim, *dbias = dweight + a.dim;
  for (int64_t i = lane * N; i < a.dim; i += TEAM * N)
#pragma unroll
    for (int j = 0; j < N; ++j) dweight[i + j] = dbias[i + j] = 0;  // only this thread ever touches them
  const float inverse = 1.0f / float(a.dim);
  for (int64_t row = team; row < a.rows; row += teams) {
    const float mean = a.mean ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    auto read = [&](int64_t i, float (&dy)[N], float (&xh)[N]) {
      load<TG, N>(static_cast<const TG*>(a.grad) + row * a.dim + i, dy);
      load<TS, N>(static_cast<const TS*>(a.saved) + element(a.saved_rows, row, i), xh);
#pragma unroll
      for (int j = 0; j < N; ++j)
        xh[j] = FROM_OUTPUT ? (xh[j] - param(a.bias, i + j, 0.0f)) / param(a.weight, i + j, 1.0f) : (xh[j] - mean) * rstd;
    };
    float sum_g = 0, sum_gx = 0;
    for (int64_t i = lane * N; i < a.dim; i += TEAM * N) {
      float dy[N], xh[N];
      read(i, dy, xh);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = dy[j] * param(a.weight, i + j, 1.0f);
        sum_g += g;
        sum_gx += g * xh[j];
      }
    }
    const float c1 = a.mean ? team_sum<TEAM>(sum_g) * inverse : 0.0f, c2 = team_sum<TEAM>(sum_gx) * inverse;
    for (int64_t i = lane * N; i < a.dim; i += TEAM * N) {
      float dy[N], xh[N], dx[N];
      read(i, dy, xh);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dx[j] = rstd * (dy[j] * param(a.weight, i + j, 1.0f) - c1 - xh[j] * c2);
        dweight[i + j] += dy[j] * xh[j];
        dbias[i + j] += dy[j];
      }
      if (a.grad_sum) {
        float extra[N];
        load<TX, N>(static_cast<const TX*>(a.grad_sum) + row * a.dim + i, extra);
#pragma unroll
        for (int j = 0; j < N; ++j) dx[j] += extra[j];
      }
      store<TX, N>(static_cast<TX*>(a.grad_input) + element(a.out_rows, row, i), dx);
    }
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool packs(const Rows& r, int64_t n) { return r.stride % n == 0 && r.group_stride % n == 0 && r.merge % n == 0; }

// Blocks of a persistent grid: enough to fill the device, never more than there are rows.
int64_t grid(int64_t rows, int team) {
  const int64_t per_block = kThreads / team;
  return std::max<int64_t>(1, std::min<int64_t>((rows + per_block - 1) / per_block, 4 * int64_t(multiprocessors())));
}

template <class TX, class TY>
void launch_forward(const NormForward& a, cudaStream_t stream) {
  constexpr int N = 16 / (sizeof(TX) > sizeof(TY) ? sizeof(TX) : sizeof(TY));
  const bool fast = a.dim % N == 0 && packs(a.x_rows, N) && packs(a.y_rows, N) && aligned(a.x) && aligned(a.y) &&
                    aligned(a.residual) && aligned(a.sum);
  const int team = a.dim <= kWarpRow ? 32 : kThreads;
  const dim3 blocks{unsigned(grid(a.rows, team))};
  if (team == 32)
    fast ? forward_kernel<TX, TY, N, 32><<<blocks, kThreads, 0, stream>>>(a) : forward_kernel<TX, TY, 1, 32><<<blocks, kThreads, 0, stream>>>(a);
  else
    fast ? forward_kernel<TX, TY, N, kThreads><<<blocks, kThreads, 0, stream>>>(a)
         : forward_kernel<TX, TY, 1, kThreads><<<blocks, kThreads, 0, stream>>>(a);
  check_launch("norm_forward");
}

template <class TX, class TG, bool FROM_OUTPUT>
void launch_backward(const NormBackward& a, Output grad_weight, Output grad_bias, cudaStream_t stream) {
  constexpr int N = 16 / (sizeof(TX) > sizeof(TG) ? sizeof(TX) : sizeof(TG));
  const bool fast = a.dim % N == 0 && packs(a.saved_rows, N) && packs(a.out_rows, N) && aligned(a.grad) && aligned(a.saved) &&
                    aligned(a.grad_sum) && aligned(a.grad_input);
  const int team = a.dim <= kWarpRow ? 32 : kThreads;
  const int64_t blocks = grid(a.rows, team), teams = blocks * (kThreads / team);
  const Scratch partial(teams * 2 * a.dim, stream);
  if (team == 32)
    fast ? backward_kernel<TX, TG, FROM_OUTPUT, N, 32><<<unsigned(blocks), kThreads, 0, stream>>>(a, partial.get())
         : backward_kernel<TX, TG, FROM_OUTPUT, 1, 32><<<unsigned(blocks), kThreads, 0, stream>>>(a, partial.get());
  else
    fast ? backward_kernel<TX, TG, FROM_OUTPUT, N, kThreads><<<unsigned(blocks), kThreads, 0, stream>>>(a, partial.get())
         : backward_kernel<TX, TG, FROM_OUTPUT, 1, kThreads><<<unsigned(blocks), kThreads, 0, stream>>>(a, partial.get());
  check_launch("norm_backward");
  reduce(partial.get(), teams, 2 * a.dim, a.dim, grad_weight, stream);
  reduce(partial.get() + a.dim, teams, 2 * a.dim, a.dim, grad_bias, stream);
}

// Calls fn<TX, TY> for the pairs of types that are offered.
template <class Fn>
void dispatch(DType x, DType y, Fn fn) {
  const int pair = 3 * int(x) + int(y);
  switch (pair) {
    case 0: return fn(float{}, float{});
    case 1: return fn(float{}, bf16_t{});
    case 2: return fn(float{}, f16_t{});
    case 3: return fn(bf16_t{}, float{});
    case 4: return fn(bf16_t{}, bf16_t{});
    case 6: return fn(f16_t{}, float{});
    case 8: return fn(f16_t{}, f16_t{});
    default: throw std::runtime_error("out_dtype: this pair of input and output types is not offered");
  }
}

}  // namespace

void norm_forward(const NormForward& a, DType x_type, DType y_type, cudaStream_t stream) {
  if (a.rows == 0) return;
  dispatch(x_type, y_type, [&](auto x, auto y) { launch_forward<decltype(x), decltype(y)>(a, stream); });
}

void norm_backward(const NormBackward& a, DType x_type, DType y_type, Output grad_weight, Output grad_bias, cudaStream_t stream) {
  dispatch(x_type, y_type, [&](auto x, auto y) {
    if (a.from_output)
      launch_backward<decltype(x), decltype(y), true>(a, grad_weight, grad_bias, stream);
    else
      launch_backward<decltype(x), decltype(y), false>(a, grad_weight, grad_bias, stream);
  });
}

}  // namespace vit::cuda
