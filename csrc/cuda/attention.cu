// Linear attention on the GPU, the mathematics of csrc/cpu/leaf/linear_attention.h. Products in fp32 on the ordinary cores: S and z must be
// fp32, and the whole is short of arithmetic rather than of tensor cores. Sums over tokens in two stages, without atomics.
#include "attention.cuh"

namespace vit::cuda {
namespace {

constexpr int64_t kChunk = 512;  // tokens per partial sum

__global__ void gather_kernel(const float* partial, int chunks, int64_t size, float* out, int64_t total) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  float sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[(i / size * chunks + chunk) * size + i % size];
  out[i] = sum;
}

struct EmitPartial {
  float* partial;
  int64_t rows, cols;
  int chunks;
  __device__ void operator()(int64_t group, int64_t chunk, int64_t i, int64_t j, float v) const {
    partial[((group * chunks + chunk) * rows + i) * cols + j] = v;
  }
};

template <class T>
struct EmitRows {  // to [groups, rows, cols], divided by the row's `den` where there is one
  T* out;
  const float* den;
  int64_t rows, cols;
  __device__ void operator()(int64_t group, int64_t, int64_t i, int64_t j, float v) const {
    from_float(den ? v / den[group * rows + i] : v, out[(group * rows + i) * cols + j]);
  }
};

unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

template <class T>
struct Runner {
  const LinearAttention& a;
  cudaStream_t stream;
  int64_t groups = a.batch * a.heads, rows = groups * a.tokens;
  int chunks = int(a.tokens ? ceil_div(a.tokens, kChunk) : 1);

  Features<T> view(const Heads& h, int64_t dim) const {
    return {static_cast<const T*>(h.data), a.heads, h.batch_stride, h.head_stride, h.token_stride, a.tokens, dim, a.feature, a.power, nullptr};
  }
  // q or k; what the focused map needs of each token is computed into `aux`, which must outlive the launches that read it
  Features<T> features(const Heads& h, const Scratch& aux) const {
    Features<T> f = view(h, a.dim);
    if (a.feature != 2) return f;
    focus_kernel<<<warps(), 256, 0, stream>>>(f, rows, aux.get());
    f.aux = aux.get();
    return f;
  }
  int64_t aux_size() const { return a.feature == 2 ? 3 * rows : 0; }
  Values<T> v() const { return {view(a.v, a.value_dim)}; }
  unsigned warps() const { return ceil_div(rows * 32, 256); }

  template <class X, class Y, class Emit>
  void product(X x, Y y, Emit emit, int64_t m, int64_t n, int64_t depth, int64_t length, int parts) const {
    const int64_t blocks = int64_t(ceil_div(n, 64)) * ceil_div(m, 64) * groups * parts;
    if (blocks > INT32_MAX) throw std::runtime_error("linear_attention: more than 2^31 tiles of 64 x 64; split the batch");
    product_kernel<<<unsigned(blocks), 256, 0, stream>>>(x, y, emit, m, n, depth, length, parts);
    check_launch("linear_attention");
  }
  template <class X, class Y, class Out>
  void tokens_product(X x, Y y, Out* out, const float* den, int64_t n, int64_t depth) const {
    product(x, y, EmitRows<Out>{out, den, a.tokens, n}, a.tokens, n, depth, depth, 1);
  }
  // sum over tokens of a[token]' b[token], and of weight[token] a[token]
  template <class B>
  void sums(Features<T> f, B b, const float* weight, float* s, float* z) const {
    const int64_t size = a.dim * a.value_dim;
    const Scratch partial(groups * chunks * size, stream), partial_z(groups * chunks * a.dim, stream);
    product(Transposed<Features<T>>{f}, b, EmitPartial{partial.get(), a.dim, a.value_dim, chunks}, a.dim, a.value_dim, a.tokens,
            kChunk, chunks);
    column_sum_kernel<<<unsigned(groups * chunks), 128, 0, stream>>>(f, weight, kChunk, chunks, partial_z.get());
    gather_kernel<<<ceil_div(groups * size, 256), 256, 0, stream>>>(partial.get(), chunks, size, s, groups * size);
    gather_kernel<<<ceil_div(groups * a.dim, 256), 256, 0, stream>>>(partial_z.get(), chunks, a.dim, z, groups * a.dim);
    check_launch("linear_attention");
  }

  void state(float* s, float* z) const {
    const Scratch aux(aux_size(), stream);
    sums(features(a.k, aux), v(), nullptr, s, z);
  }

  void output(const float* s, const float* z) const {
    const Scratch aux(aux_size(), stream);
    const Features<T> q = features(a.q, aux);
    row_dot_kernel<<<warps(), 256, 0, stream>>>(q, z, false, a.eps, nullptr, a.den, rows);
    tokens_product(q, Matrix{s, a.dim, a.value_dim}, static_cast<T*>(a.out), a.den, a.value_dim, a.dim);
  }

  void backward_q(const float* s, const float* z, float* ds, float* dz) const {
    const Scratch aux(aux_size(), stream), da(rows * a.dim, stream), w(rows, stream);
    const Features<T> q = features(a.q, aux);
    const ScaledGrad<T> u{view(a.grad, a.value_dim), a.den};
    tokens_product(u, Transposed<Matrix>{{s, a.dim, a.value_dim}}, da.get(), nullptr, a.dim, a.value_dim);
    row_dot_kernel<<<warps(), 256, 0, stream>>>(q, da.get(), true, 0.0f, a.den, w.get(), rows);
    feature_grad_kernel<<<warps(), 256, 0, stream>>>(q, da.get(), w.get(), z, static_cast<T*>(a.grad_q), rows);
    sums(q, u, w.get(), ds, dz);
  }

  void backward_kv(const float* ds, const float* dz) const {
    const Scratch aux(aux_size(), stream), db(rows * a.dim, stream);
    const Features<T> k = features(a.k, aux);
    const Matrix state{ds, a.dim, a.value_dim};
    tokens_product(v(), Transposed<Matrix>{state}, db.get(), nullptr, a.dim, a.value_dim);
    feature_grad_kernel<<<warps(), 256, 0, stream>>>(k, db.get(), nullptr, dz, static_cast<T*>(a.grad_k), rows);
    tokens_product(k, state, static_cast<T*>(a.grad_v), nullptr, a.value_dim, a.dim);
  }
};

template <class Fn>
void dispatch(DType type, Fn fn) {
  if (type == DType::bf16) return fn(bf16_t{});
  if (type == DType::f16) return fn(f16_t{});
  fn(float{});
}

// fn(runner), if there are any tokens
template <class Fn>
void run(const LinearAttention& a, DType type, cudaStream_t stream, Fn fn) {
  if (a.batch * a.heads * a.tokens == 0) return;
  dispatch(type, [&](auto t) { fn(Runner<decltype(t)>{a, stream}); });
}

// The same for a phase that sums over tokens: without any, the sums are zero.
template <class Fn>
void run_sums(const LinearAttention& a, DType type, float* s, float* z, cudaStream_t stream, Fn fn) {
  const int64_t groups = a.batch * a.heads;
  if (groups && a.tokens == 0) {
    check(cudaMemsetAsync(s, 0, size_t(groups * a.dim * a.value_dim) * sizeof(float), stream), "linear_attention");
    check(cudaMemsetAsync(z, 0, size_t(groups * a.dim) * sizeof(float), stream), "linear_attention");
  }
  run(a, type, stream, fn);
}

}  // namespace

void linear_attention_forward(const LinearAttention& a, DType type, float* s, float* z, cudaStream_t stream) {
  linear_attention_state(a, type, s, z, stream);
  linear_attention_output(a, type, s, z, stream);
}

void linear_attention_backward(const LinearAttention& a, DType type, const float* s, const float* z, cudaStream_t stream) {
  const int64_t groups = a.batch * a.heads;
  const Scratch ds(groups * a.dim * a.value_dim, stream), dz(groups * a.dim, stream);
  linear_attention_backward_q(a, type, s, z, ds.get(), dz.get(), stream);
  linear_attention_backward_kv(a, type, ds.get(), dz.get(), stream);
}

void linear_attention_state(const LinearAttention& a, DType type, float* s, float* z, cudaStream_t stream) {
  run_sums(a, type, s, z, stream, [&](auto runner) { runner.state(s, z); });
}

void linear_attention_output(const LinearAttention& a, DType type, const float* s, const float* z, cudaStream_t stream) {
  run(a, type, stream, [&](auto runner) { runner.output(s, z); });
}

void linear_attention_backward_q(const LinearAttention& a, DType type, const float* s, const float* z, float* ds, float* dz,
                                 cudaStream_t stream) {
  run_sums(a, type, ds, dz, stream, [&](auto runner) { runner.backward_q(s, z, ds, dz); });
}

void linear_attention_backward_kv(const LinearAttention& a, DType type, const float* ds, const float* dz, cudaStream_t stream) {
  run(a, type, stream, [&](auto runner) { runner.backward_kv(ds, dz); });
}

}  // namespace vit::cuda
