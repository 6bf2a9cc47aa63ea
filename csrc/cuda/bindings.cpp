// pybind11 binding of the CUDA kernels: the same functions and arguments as csrc/cpu/bindings.cpp, with a stream in the place of the
// number of threads. All launches are asynchronous on that stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernels.h"

namespace py = pybind11;
using namespace vit;
using namespace vit::cuda;

namespace {

using Address = std::uintptr_t;
using Sizes = std::array<int64_t, 4>;

template <class T = void>
T* ptr(Address a) {
  return reinterpret_cast<T*>(a);
}
cudaStream_t stream_of(Address a) { return reinterpret_cast<cudaStream_t>(a); }
Param param(Address data, int type) { return {ptr(data), DType(type)}; }
Output output(Address data, int type) { return {ptr(data), DType(type)}; }
void* shifted(Address data, int64_t elements, int type) { return ptr(data + Address(elements * size_of(DType(type)))); }

void layer_norm_forward(Address x, Address residual, Address sum, Address y, Address weight, int weight_type, Address bias,
                        int bias_type, Address mean, Address rstd, int64_t rows, int64_t dim, int64_t x_stride, int x_type,
                        int y_type, float eps, Address stream) {
  const NormForward a{ptr(x), ptr(residual), ptr(sum), ptr(y), param(weight, weight_type), param(bias, bias_type), ptr<float>(mean),
                      ptr<float>(rstd), rows, dim, {x_stride, INT64_MAX, 0, 0, 0}, dense(dim), eps};
  norm_forward(a, DType(x_type), DType(y_type), stream_of(stream));
}

void layer_norm_backward(Address grad, Address saved, Address grad_sum, Address grad_input, Address weight, int weight_type,
                         Address bias, int bias_type, Address mean, Address rstd, Address grad_weight, int grad_weight_type,
                         Address grad_bias, int grad_bias_type, int64_t rows, int64_t dim, int64_t saved_stride, int x_type,
                         int y_type, bool from_output, Address stream) {
  const NormBackward a{ptr(grad), ptr(saved), ptr(grad_sum), ptr(grad_input), param(weight, weight_type), param(bias, bias_type),
                       ptr<float>(mean), ptr<float>(rstd), rows, dim, {saved_stride, INT64_MAX, 0, 0, 0}, dense(dim), from_output};
  norm_backward(a, DType(x_type), DType(y_type), output(grad_weight, grad_weight_type), output(grad_bias, grad_bias_type),
                stream_of(stream));
}

void bias_gelu_forward(Address x, int64_t x_stride, Address bias, int bias_type, Address y, int64_t y_stride, int64_t rows, int64_t dim,
                       int type, int form, Address stream) {
  const Gelu a{ptr(x), nullptr, ptr(y), nullptr, param(bias, bias_type), rows, dim, x_stride, 0, y_stride, GeluForm(form)};
  gelu_forward(a, DType(type), stream_of(stream));
}

void bias_gelu_backward(Address grad, int64_t grad_stride, Address x, int64_t x_stride, Address bias, int bias_type, Address grad_input,
                        Address grad_bias, int grad_bias_type, int64_t rows, int64_t dim, int type, int form, Address stream) {
  const Gelu a{ptr(x), ptr(grad), nullptr, ptr(grad_input), param(bias, bias_type), rows, dim, x_stride, grad_stride, 0, GeluForm(form)};
  gelu_backward(a, DType(type), output(grad_bias, grad_bias_type), stream_of(stream));
}

void qk_forward(Address packed, Address q, Address k, Address v, Address q_weight, int q_weight_type, Address k_weight,
                int k_weight_type, Address mean, Address rstd, const Sizes& sizes, int type, float eps, Address stream) {
  const auto [tokens, heads, dim, token_stride] = sizes;
  const int64_t width = heads * dim, rows = tokens * heads, size = size_of(DType(type));
  const Rows in_packed{dim, heads, token_stride, 0, 0};
  for (int64_t i = 0; i < 2; ++i) {
    void* x = shifted(packed, i * width, type);
    const NormForward a{x, nullptr, nullptr, q ? ptr(i ? k : q) : x, i ? param(k_weight, k_weight_type) : param(q_weight, q_weight_type),
                        {}, mean ? ptr<float>(mean) + i * rows : nullptr, ptr<float>(rstd) + i * rows, rows, dim, in_packed,
                        q ? dense(dim) : in_packed, eps};
    norm_forward(a, DType(type), DType(type), stream_of(stream));
  }
  if (q) copy_rows(ptr(v), width * size, shifted(packed, 2 * width, type), token_stride * size, width * size, tokens, stream_of(stream));
}

void qk_backward(Address grad_q, Address grad_k, Address grad_v, Address packed, Address grad_packed, Address q_weight,
                 int q_weight_type, Address k_weight, int k_weight_type, Address mean, Address rstd, Address grad_q_weight,
                 int grad_q_weight_type, Address grad_k_weight, int grad_k_weight_type, const Sizes& sizes, int type, Address stream) {
  const auto [tokens, heads, dim, token_stride] = sizes;
  const int64_t width = heads * dim, rows = tokens * heads, size = size_of(DType(type));
  for (int64_t i = 0; i < 2; ++i) {
    const NormBackward a{ptr(i ? grad_k : grad_q), shifted(packed, i * width, type), nullptr, shifted(grad_packed, i * width, type),
                         i ? param(k_weight, k_weight_type) : param(q_weight, q_weight_type), {},
                         mean ? ptr<float>(mean) + i * rows : nullptr, ptr<float>(rstd) + i * rows, rows, dim,
                         {dim, heads, token_stride, 0, 0}, {dim, heads, 3 * width, 0, 0}, false};
    norm_backward(a, DType(type), DType(type), i ? output(grad_k_weight, grad_k_weight_type) : output(grad_q_weight, grad_q_weight_type),
                  {}, stream_of(stream));
  }
  copy_rows(shifted(grad_packed, 2 * width, type), 3 * width * size, ptr(grad_v), width * size, width * size, tokens, stream_of(stream));
}

void merge_forward(Address x, Address y, Address weight, int weight_type, Address bias, int bias_type, Address mean, Address rstd,
                   const Sizes& sizes, int type, float eps, Address stream) {
  const auto [batch, height, width, channels] = sizes;
  const int64_t dim = 4 * channels;
  const NormForward a{ptr(x), nullptr, nullptr, ptr(y), param(weight, weight_type), param(bias, bias_type), ptr<float>(mean),
                      ptr<float>(rstd), batch * height * width, dim, {dim, INT64_MAX, 0, channels, width}, dense(dim), eps};
  norm_forward(a, DType(type), DType(type), stream_of(stream));
}

void merge_backward(Address grad, Address x, Address grad_input, Address weight, int weight_type, Address mean, Address rstd,
                    Address grad_weight, int grad_weight_type, Address grad_bias, int grad_bias_type, const Sizes& sizes, int type,
                    Address stream) {
  const auto [batch, height, width, channels] = sizes;
  const int64_t dim = 4 * channels;
  const Rows in_image{dim, INT64_MAX, 0, channels, width};
  const NormBackward a{ptr(grad), ptr(x), nullptr, ptr(grad_input), param(weight, weight_type), {}, ptr<float>(mean), ptr<float>(rstd),
                       batch * height * width, dim, in_image, in_image, false};
  norm_backward(a, DType(type), DType(type), output(grad_weight, grad_weight_type), output(grad_bias, grad_bias_type),
                stream_of(stream));
}

using Strides = std::array<int64_t, 3>;
using AttentionSizes = std::array<int64_t, 5>;

Heads heads(Address data, const Strides& s) { return {ptr(data), s[0], s[1], s[2]}; }

void attention_forward(Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v, const Strides& v_strides,
                       Address out, Address s, Address z, Address den, const AttentionSizes& n, int type, int feature, int power,
                       float eps, Address stream) {
  const LinearAttention a{heads(q, q_strides), heads(k, k_strides), heads(v, v_strides), {}, ptr(out), nullptr, nullptr, nullptr,
                          ptr<float>(den), n[0], n[1], n[2], n[3], n[4], feature, power, eps};
  linear_attention_forward(a, DType(type), ptr<float>(s), ptr<float>(z), stream_of(stream));
}

void attention_backward(Address grad, const Strides& grad_strides, Address q, const Strides& q_strides, Address k,
                        const Strides& k_strides, Address v, const Strides& v_strides, Address s, Address z, Address den,
                        Address grad_q, Address grad_k, Address grad_v, const AttentionSizes& n, int type, int feature, int power,
                        Address stream) {
  const LinearAttention a{heads(q, q_strides), heads(k, k_strides), heads(v, v_strides), heads(grad, grad_strides), nullptr,
                          ptr(grad_q), ptr(grad_k), ptr(grad_v), ptr<float>(den), n[0], n[1], n[2], n[3], n[4], feature, power, 0.0f};
  linear_attention_backward(a, DType(type), ptr<float>(s), ptr<float>(z), stream_of(stream));
}

LinearAttention attention_args(const AttentionSizes& n, int feature, int power) {
  LinearAttention a{};
  a.batch = n[0], a.heads = n[1], a.tokens = n[2], a.dim = n[3], a.value_dim = n[4], a.feature = feature, a.power = power;
  return a;
}

void attention_state(Address k, const Strides& k_strides, Address v, const Strides& v_strides, Address s, Address z,
                     const AttentionSizes& n, int type, int feature, int power, Address stream) {
  LinearAttention a = attention_args(n, feature, power);
  a.k = heads(k, k_strides), a.v = heads(v, v_strides);
  linear_attention_state(a, DType(type), ptr<float>(s), ptr<float>(z), stream_of(stream));
}

void attention_output(Address q, const Strides& q_strides, Address s, Address z, Address out, Address den, const AttentionSizes& n,
                      int type, int feature, int power, float eps, Address stream) {
  LinearAttention a = attention_args(n, feature, power);
  a.q = heads(q, q_strides), a.out = ptr(out), a.den = ptr<float>(den), a.eps = eps;
  linear_attention_output(a, DType(type), ptr<float>(s), ptr<float>(z), stream_of(stream));
}

void attention_backward_q(Address grad, const Strides& grad_strides, Address q, const Strides& q_strides, Address s, Address z,
                          Address den, Address grad_q, Address ds, Address dz, const AttentionSizes& n, int type, int feature,
                          int power, Address stream) {
  LinearAttention a = attention_args(n, feature, power);
  a.grad = heads(grad, grad_strides), a.q = heads(q, q_strides), a.grad_q = ptr(grad_q), a.den = ptr<float>(den);
  linear_attention_backward_q(a, DType(type), ptr<float>(s), ptr<float>(z), ptr<float>(ds), ptr<float>(dz), stream_of(stream));
}

void attention_backward_kv(Address k, const Strides& k_strides, Address v, const Strides& v_strides, Address ds, Address dz,
                           Address grad_k, Address grad_v, const AttentionSizes& n, int type, int feature, int power, Address stream) {
  LinearAttention a = attention_args(n, feature, power);
  a.k = heads(k, k_strides), a.v = heads(v, v_strides), a.grad_k = ptr(grad_k), a.grad_v = ptr(grad_v);
  linear_attention_backward_kv(a, DType(type), ptr<float>(ds), ptr<float>(dz), stream_of(stream));
}

void adamw_step(Address weight, Address grad, int grad_type, Address moment, Address square, Address model_weight, int model_type,
                int64_t size, float decay, float step_size, double beta1, double beta2, float eps, float root_correction,
                float grad_scale, Address stream) {
  const AdamW a{ptr<float>(weight), ptr<float>(moment), ptr<float>(square), ptr(grad), ptr(model_weight), decay, step_size,
                float(beta1), float(beta2), float(1 - beta1), float(1 - beta2), eps, root_correction, grad_scale};
  adamw(a, size, DType(grad_type), DType(model_type), stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Vitruvius CUDA kernels";
  m.def("architectures", [] { return VITRUVIUS_ARCHS; });
  m.def("device_count", &device_count, "0 where there is no driver.");
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("gelu_forward", &bias_gelu_forward);
  m.def("gelu_backward", &bias_gelu_backward);
  m.def("qk_norm_forward", &qk_forward);
  m.def("qk_norm_backward", &qk_backward);
  m.def("patch_merge_forward", &merge_forward);
  m.def("patch_merge_backward", &merge_backward);
  m.def("linear_attention_forward", &attention_forward);
  m.def("linear_attention_backward", &attention_backward);
  m.def("linear_attention_state", &attention_state);
  m.def("linear_attention_output", &attention_output);
  m.def("linear_attention_backward_q", &attention_backward_q);
  m.def("linear_attention_backward_kv", &attention_backward_kv);
  m.def("adamw", &adamw_step);
}
