// bias + GELU, AdamW, and the second stage of the reductions.
#include <algorithm>

#include "common.cuh"

namespace vit::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void reduce_kernel(const float* partial, int64_t parts, int64_t stride, int64_t dim, T* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= dim) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * stride + i];
  from_float(sum, out[i]);
}

__device__ inline void gelu(float s, GeluForm form, float& value, float& slope) {
  if (form == GeluForm::tanh) {
    const float c = 0.797884561f, inner = c * (s + 0.044715f * s * s * s);
    const float t = tanhf(inner), rest = (1.0f - t) * (1.0f + t), cdf = 0.5f * (1.0f + t);
    value = s * cdf;
    slope = cdf + (rest > 0.0f ? 0.5f * s * rest * c * (1.0f + 3 * 0.044715f * s * s) : 0.0f);
  } else if (form == GeluForm::quick) {  // as in csrc/cpu/leaf/elementwise.h
    const float half = expf(-0.5f * fabsf(1.702f * s)), tail = half * half, large = 1.0f / (1.0f + tail);
    const float small = s * half * half * large;
    value = s > 0.0f ? s * large : small;
    slope = (s > 0.0f ? large : tail * large) + 1.702f * small * large;
  } else {
    const float cdf = 0.5f * erfcf(-0.707106781f * s);
    value = s * cdf;
    slope = cdf + s * 0.398942280f * expf(-0.5f * s * s);
  }
}

template <class T, int N>
__global__ void gelu_forward_kernel(Gelu a) {
  const int64_t size = a.rows * a.dim, step = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < size; i += step) {
    const int64_t row = i / a.dim, column = i - row * a.dim;
    float v[N], slope;
    load<T, N>(static_cast<const T*>(a.x) + row * a.x_stride + column, v);
#pragma unroll
    for (int j = 0; j < N; ++j) gelu(v[j] + param(a.bias, column + j, 0.0f), a.form, v[j], slope);
    store<T, N>(static_cast<T*>(a.y) + row * a.y_stride + column, v);
  }
}

// A block takes kThreads * N columns of a chunk of rows; each thread sums the bias gradient of its columns in registers.
template <class T, int N>
__global__ void gelu_backward_kernel(Gelu a, int64_t chunk_rows, float* partial) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= a.dim) return;
  const int64_t begin = blockIdx.y * chunk_rows, end = min(begin + chunk_rows, a.rows);
  float bias[N], sum[N];
#pragma unroll
  for (int j = 0; j < N; ++j) bias[j] = param(a.bias, column + j, 0.0f), sum[j] = 0;
  for (int64_t row = begin; row < end; ++row) {
    float x[N], grad[N];
    load<T, N>(static_cast<const T*>(a.x) + row * a.x_stride + column, x);
    load<T, N>(static_cast<const T*>(a.grad) + row * a.grad_stride + column, grad);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value, slope;
      gelu(x[j] + bias[j], a.form, value, slope);
      grad[j] *= slope;
      sum[j] += grad[j];
    }
    store<T, N>(static_cast<T*>(a.grad_input) + row * a.dim + column, grad);
  }
  if (partial)
#pragma unroll
    for (int j = 0; j < N; ++j) partial[blockIdx.y * a.dim + column + j] = sum[j];
}

// N = 4 where every array starts at a multiple of 16 bytes, else 1
template <class TG, class TM, int N>
__global__ void adamw_kernel(AdamW a, int64_t size) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; first < size; first += step) {
    float g[N], m[N], v[N], w[N];
    const bool whole = first + N <= size;
    if (whole) {
      load<TG, N>(static_cast<const TG*>(a.grad) + first, g);
      load<float, N>(a.moment + first, m);
      load<float, N>(a.square + first, v);
      load<float, N>(a.weight + first, w);
    }
    for (int j = 0; j < N && first + j < size; ++j) {
      if (!whole) {
        g[j] = to_float(static_cast<const TG*>(a.grad)[first + j]);
        m[j] = a.moment[first + j], v[j] = a.square[first + j], w[j] = a.weight[first + j];
      }
      const float grad = g[j] * a.grad_scale;
      m[j] = m[j] * a.beta1 + grad * a.rest1;
      v[j] = v[j] * a.beta2 + grad * grad * a.rest2;
      w[j] = w[j] * a.decay - a.step_size * m[j] / (sqrtf(v[j]) * a.root_correction + a.eps);
      if (!whole) {
        a.moment[first + j] = m[j], a.square[first + j] = v[j], a.weight[first + j] = w[j];
        if (a.model_weight) from_float(w[j], static_cast<TM*>(a.model_weight)[first + j]);
      }
    }
    if (whole) {
      store<float, N>(a.moment + first, m);
      store<float, N>(a.square + first, v);
      store<float, N>(a.weight + first, w);
      if (a.model_weight) store<TM, N>(static_cast<TM*>(a.model_weight) + first, w);
    }
  }
}

template <class Fn>
void dispatch(DType type, Fn fn) {
  if (type == DType::bf16) return fn(bf16_t{});
  if (type == DType::f16) return fn(f16_t{});
  fn(float{});
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
unsigned blocks_for(int64_t threads) {
  return unsigned(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, 8 * int64_t(multiprocessors())));
}

}  // namespace

void reduce(const float* partial, int64_t parts, int64_t stride, int64_t dim, Output out, cudaStream_t stream) {
  if (!out.data) return;
  const unsigned blocks = unsigned((dim + kThreads - 1) / kThreads);
  dispatch(out.type, [&](auto t) {
    reduce_kernel<<<blocks, kThreads, 0, stream>>>(partial, parts, stride, dim, static_cast<decltype(t)*>(out.data));
  });
  check_launch("reduce");
}

void gelu_forward(const Gelu& a, DType type, cudaStream_t stream) {
  if (a.rows == 0) return;
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    constexpr int N = 16 / sizeof(T);
    const int64_t size = a.rows * a.dim;
    if (a.dim % N == 0 && a.x_stride % N == 0 && a.y_stride % N == 0 && aligned(a.x) && aligned(a.y))
      gelu_forward_kernel<T, N><<<blocks_for(size / N), kThreads, 0, stream>>>(a);
    else
      gelu_forward_kernel<T, 1><<<blocks_for(size), kThreads, 0, stream>>>(a);
  });
  check_launch("gelu_forward");
}

void gelu_backward(const Gelu& a, DType type, Output grad_bias, cudaStream_t stream) {
  const int64_t chunks = std::clamp<int64_t>(a.rows / 32, 1, 1024), chunk_rows = (a.rows + chunks - 1) / chunks;
  const Scratch partial(grad_bias.data ? chunks * a.dim : 0, stream);
  dispatch(type, [&](auto t) {
    using T = decltype(t);
    constexpr int N = 16 / sizeof(T);
    const bool fast = a.dim % N == 0 && a.x_stride % N == 0 && a.grad_stride % N == 0 && aligned(a.x) && aligned(a.grad) &&
                      aligned(a.grad_input);
    const int64_t columns = fast ? a.dim / N : a.dim;
    const dim3 blocks{unsigned((columns + kThreads - 1) / kThreads), unsigned(chunks)};
    if (fast)
      gelu_backward_kernel<T, N><<<blocks, kThreads, 0, stream>>>(a, chunk_rows, partial.get());
    else
      gelu_backward_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(a, chunk_rows, partial.get());
  });
  check_launch("gelu_backward");
  reduce(partial.get(), chunks, a.dim, a.dim, grad_bias, stream);
}

void adamw(const AdamW& a, int64_t size, DType grad_type, DType model_type, cudaStream_t stream) {
  if (size == 0) return;
  const bool fast = aligned(a.weight) && aligned(a.moment) && aligned(a.square) && aligned(a.grad) && aligned(a.model_weight);
  dispatch(grad_type, [&](auto g) {
    dispatch(a.model_weight ? model_type : DType::f32, [&](auto m) {
      if (fast)
        adamw_kernel<decltype(g), decltype(m), 4><<<blocks_for(size / 4), kThreads, 0, stream>>>(a, size);
      else
        adamw_kernel<decltype(g), decltype(m), 1><<<blocks_for(size), kThreads, 0, stream>>>(a, size);
    });
  });
  check_launch("adamw");
}

void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows, cudaStream_t stream) {
  if (rows)
    check(cudaMemcpy2DAsync(to, size_t(to_stride), from, size_t(from_stride), size_t(bytes), size_t(rows), cudaMemcpyDeviceToDevice, stream),
          "copy of v");
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;  // no driver, no device: no error
}

}  // namespace vit::cuda
