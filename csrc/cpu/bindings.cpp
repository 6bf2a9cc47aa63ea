// pybind11 binding of the CPU kernels. Pointers arrive as integers (Tensor.data_ptr()), element types as DType numbers. Shapes,
// strides and types were checked by the Python face; nothing here knows a tensor. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <array>
#include <cstdint>

#include "elementwise.h"
#include "linear_attention.h"
#include "mapped_attention.h"
#include "norm.h"
#include "parallel.h"
#include "patch_merge.h"
#include "qk_norm.h"
#include "table.h"

namespace py = pybind11;
using namespace vit;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* ptr(Address a) {
  return reinterpret_cast<T*>(a);
}

void layer_norm_forward(Address x, Address residual, Address sum, Address y, Address weight, int weight_type, Address bias,
                        int bias_type, Address mean, Address rstd, int64_t rows, int64_t dim, int64_t x_stride, int x_type,
                        int y_type, float eps, int threads) {
  NormForward a{};
  a.x = ptr(x), a.residual = ptr(residual), a.sum = ptr(sum), a.y = ptr(y);
  a.mean = ptr<float>(mean), a.rstd = ptr<float>(rstd);
  a.rows = rows, a.dim = dim, a.eps = eps;
  a.x_rows = {x_stride}, a.y_rows = {dim};
  norm_forward(a, DType(x_type), DType(y_type), {ptr(weight), DType(weight_type)}, {ptr(bias), DType(bias_type)}, threads);
}

void layer_norm_backward(Address grad, Address saved, Address grad_sum, Address grad_input, Address weight, int weight_type,
                         Address bias, int bias_type, Address mean, Address rstd, Address grad_weight, int grad_weight_type,
                         Address grad_bias, int grad_bias_type, int64_t rows, int64_t dim, int64_t saved_stride, int x_type,
                         int y_type, bool from_output, int threads) {
  NormBackward a{};
  a.grad = ptr(grad), a.saved = ptr(saved), a.grad_sum = ptr(grad_sum), a.grad_input = ptr(grad_input);
  a.mean = ptr<float>(mean), a.rstd = ptr<float>(rstd);
  a.rows = rows, a.dim = dim;
  a.saved_rows = {saved_stride}, a.out_rows = {dim};
  norm_backward(a, DType(x_type), DType(y_type), from_output, {ptr(weight), DType(weight_type)}, {ptr(bias), DType(bias_type)},
                {ptr(grad_weight), DType(grad_weight_type)}, {ptr(grad_bias), DType(grad_bias_type)}, threads);
}

using Strides = std::array<int64_t, 3>;

Heads heads(Address data, const Strides& s) { return {ptr(data), s[0], s[1], s[2]}; }

LinearAttention linear_attention_args(const std::array<int64_t, 5>& sizes, int feature, int power, float eps) {
  LinearAttention a{};
  a.batch = sizes[0], a.heads = sizes[1], a.tokens = sizes[2], a.dim = sizes[3], a.value_dim = sizes[4];
  a.feature = Feature(feature), a.power = power, a.eps = eps;
  return a;
}

void attention_forward(Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v, const Strides& v_strides,
                       Address out, Address s, Address z, Address den, const std::array<int64_t, 5>& sizes, int type, int feature,
                       int power, float eps, int threads) {
  auto a = linear_attention_args(sizes, feature, power, eps);
  a.q = heads(q, q_strides), a.k = heads(k, k_strides), a.v = heads(v, v_strides);
  a.out = ptr(out), a.den = ptr<float>(den);
  linear_attention_forward(a, DType(type), ptr<float>(s), ptr<float>(z), threads);
}

void attention_backward(Address grad, const Strides& grad_strides, Address q, const Strides& q_strides, Address k,
                        const Strides& k_strides, Address v, const Strides& v_strides, Address s, Address z, Address den,
                        Address grad_q, Address grad_k, Address grad_v, const std::array<int64_t, 5>& sizes, int type, int feature,
                        int power, int threads) {
  auto a = linear_attention_args(sizes, feature, power, 0.0f);
  a.grad = heads(grad, grad_strides), a.q = heads(q, q_strides), a.k = heads(k, k_strides), a.v = heads(v, v_strides);
  a.grad_q = ptr(grad_q), a.grad_k = ptr(grad_k), a.grad_v = ptr(grad_v), a.den = ptr<float>(den);
  linear_attention_backward(a, DType(type), ptr<float>(s), ptr<float>(z), threads);
}

void attention_state(Address k, const Strides& k_strides, Address v, const Strides& v_strides, Address s, Address z,
                     const std::array<int64_t, 5>& sizes, int type, int feature, int power, int threads) {
  auto a = linear_attention_args(sizes, feature, power, 0.0f);
  a.k = heads(k, k_strides), a.v = heads(v, v_strides);
  linear_attention_state(a, DType(type), ptr<float>(s), ptr<float>(z), threads);
}

void attention_output(Address q, const Strides& q_strides, Address s, Address z, Address out, Address den,
                      const std::array<int64_t, 5>& sizes, int type, int feature, int power, float eps, int threads) {
  auto a = linear_attention_args(sizes, feature, power, eps);
  a.q = heads(q, q_strides), a.out = ptr(out), a.den = ptr<float>(den);
  linear_attention_output(a, DType(type), ptr<float>(s), ptr<float>(z), threads);
}

void attention_backward_q(Address grad, const Strides& grad_strides, Address q, const Strides& q_strides, Address s, Address z,
                          Address den, Address grad_q, Address ds, Address dz, const std::array<int64_t, 5>& sizes, int type,
                          int feature, int power, int threads) {
  auto a = linear_attention_args(sizes, feature, power, 0.0f);
  a.grad = heads(grad, grad_strides), a.q = heads(q, q_strides), a.grad_q = ptr(grad_q), a.den = ptr<float>(den);
  linear_attention_backward_q(a, DType(type), ptr<float>(s), ptr<float>(z), ptr<float>(ds), ptr<float>(dz), threads);
}

void attention_backward_kv(Address k, const Strides& k_strides, Address v, const Strides& v_strides, Address ds, Address dz,
                           Address grad_k, Address grad_v, const std::array<int64_t, 5>& sizes, int type, int feature, int power,
                           int threads) {
  auto a = linear_attention_args(sizes, feature, power, 0.0f);
  a.k = heads(k, k_strides), a.v = heads(v, v_strides), a.grad_k = ptr(grad_k), a.grad_v = ptr(grad_v);
  linear_attention_backward_kv(a, DType(type), ptr<float>(ds), ptr<float>(dz), threads);
}

void attention_with_map(Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v, const Strides& v_strides,
                        Address out, const Strides& out_strides, Address map, const std::array<int64_t, 4>& sizes, bool causal, int type,
                        int threads) {
  MappedAttention a{};
  a.q = heads(q, q_strides), a.k = heads(k, k_strides), a.v = heads(v, v_strides), a.out = heads(out, out_strides);
  a.map = ptr<float>(map), a.causal = causal;
  a.batch = sizes[0], a.heads = sizes[1], a.tokens = sizes[2], a.dim = sizes[3];
  mapped_attention(a, DType(type), threads);
}

Param param(Address data, int type) { return {ptr(data), DType(type)}; }
Output output(Address data, int type) { return {ptr(data), DType(type)}; }

void bias_gelu_forward(Address x, int64_t x_stride, Address bias, int bias_type, Address y, int64_t y_stride, int64_t rows, int64_t dim,
                       int type, int form, int threads) {
  Gelu a{};
  a.x = ptr(x), a.y = ptr(y), a.rows = rows, a.dim = dim, a.form = GeluForm(form), a.x_stride = x_stride, a.y_stride = y_stride;
  gelu_forward(a, DType(type), param(bias, bias_type), threads);
}

void bias_gelu_backward(Address grad, int64_t grad_stride, Address x, int64_t x_stride, Address bias, int bias_type, Address grad_input,
                        Address grad_bias, int grad_bias_type, int64_t rows, int64_t dim, int type, int form, int threads) {
  Gelu a{};
  a.grad = ptr(grad), a.x = ptr(x), a.grad_input = ptr(grad_input), a.rows = rows, a.dim = dim, a.form = GeluForm(form);
  a.grad_stride = grad_stride, a.x_stride = x_stride;
  gelu_backward(a, DType(type), param(bias, bias_type), output(grad_bias, grad_bias_type), threads);
}

using Sizes = std::array<int64_t, 4>;

QkNorm qk_args(Address packed, Address mean, Address rstd, const Sizes& sizes) {
  QkNorm a{};
  a.packed = ptr(packed), a.mean = ptr<float>(mean), a.rstd = ptr<float>(rstd);
  a.tokens = sizes[0], a.heads = sizes[1], a.dim = sizes[2], a.token_stride = sizes[3];
  return a;
}

void qk_forward(Address packed, Address q, Address k, Address v, Address q_weight, int q_weight_type, Address k_weight,
                int k_weight_type, Address mean, Address rstd, const Sizes& sizes, int type, float eps, int threads) {
  QkNorm a = qk_args(packed, mean, rstd, sizes);
  a.q = ptr(q), a.k = ptr(k), a.v = ptr(v), a.eps = eps;
  qk_norm_forward(a, DType(type), param(q_weight, q_weight_type), param(k_weight, k_weight_type), threads);
}

void qk_backward(Address grad_q, Address grad_k, Address grad_v, Address packed, Address grad_packed, Address q_weight,
                 int q_weight_type, Address k_weight, int k_weight_type, Address mean, Address rstd, Address grad_q_weight,
                 int grad_q_weight_type, Address grad_k_weight, int grad_k_weight_type, const Sizes& sizes, int type, int threads) {
  QkNorm a = qk_args(packed, mean, rstd, sizes);
  a.grad_q = ptr(grad_q), a.grad_k = ptr(grad_k), a.grad_v = ptr(grad_v), a.grad_packed = ptr(grad_packed);
  qk_norm_backward(a, DType(type), param(q_weight, q_weight_type), param(k_weight, k_weight_type),
                   output(grad_q_weight, grad_q_weight_type), output(grad_k_weight, grad_k_weight_type), threads);
}

PatchMerge merge_args(Address mean, Address rstd, const Sizes& sizes) {
  PatchMerge a{};
  a.mean = ptr<float>(mean), a.rstd = ptr<float>(rstd);
  a.batch = sizes[0], a.height = sizes[1], a.width = sizes[2], a.channels = sizes[3];
  return a;
}

void merge_forward(Address x, Address y, Address weight, int weight_type, Address bias, int bias_type, Address mean, Address rstd,
                   const Sizes& sizes, int type, float eps, int threads) {
  PatchMerge a = merge_args(mean, rstd, sizes);
  a.x = ptr(x), a.y = ptr(y), a.eps = eps;
  patch_merge_forward(a, DType(type), param(weight, weight_type), param(bias, bias_type), threads);
}

void merge_backward(Address grad, Address x, Address grad_input, Address weight, int weight_type, Address mean, Address rstd,
                    Address grad_weight, int grad_weight_type, Address grad_bias, int grad_bias_type, const Sizes& sizes, int type,
                    int threads) {
  PatchMerge a = merge_args(mean, rstd, sizes);
  a.grad = ptr(grad), a.x = ptr(x), a.grad_input = ptr(grad_input);
  patch_merge_backward(a, DType(type), param(weight, weight_type), output(grad_weight, grad_weight_type),
                       output(grad_bias, grad_bias_type), threads);
}

void adamw_step(Address weight, Address grad, int grad_type, Address moment, Address square, Address model_weight, int model_type,
                int64_t size, float decay, float step_size, double beta1, double beta2, float eps, float root_correction,
                float grad_scale, int threads) {
  const AdamW a{ptr<float>(weight), ptr<float>(moment), ptr<float>(square), ptr(grad), ptr(model_weight), decay, step_size, float(beta1),
                float(beta2), float(1 - beta1), float(1 - beta2), eps, root_correction, grad_scale};
  adamw(a, size, DType(grad_type), DType(model_type), threads);
}

bool tune_allocator() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

py::list instruction_sets() {
  py::list names;
  for (const char* name : {"baseline", "avx2", "avx512", "avx512bf16"})
    if (find_table(name)) names.append(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Vitruvius CPU kernels";
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_set", [] { return table().name; });
  m.def("instruction_sets", &instruction_sets, "Those that this processor runs.");
  m.def("threading", [] { return threading(); });
  m.def("tune_allocator", &tune_allocator);
  m.def("layer_norm_forward", &layer_norm_forward, release());
  m.def("layer_norm_backward", &layer_norm_backward, release());
  m.def("gelu_forward", &bias_gelu_forward, release());
  m.def("gelu_backward", &bias_gelu_backward, release());
  m.def("qk_norm_forward", &qk_forward, release());
  m.def("qk_norm_backward", &qk_backward, release());
  m.def("patch_merge_forward", &merge_forward, release());
  m.def("patch_merge_backward", &merge_backward, release());
  m.def("adamw", &adamw_step, release());
  m.def("linear_attention_forward", &attention_forward, release());
  m.def("linear_attention_backward", &attention_backward, release());
  m.def("linear_attention_state", &attention_state, release());
  m.def("linear_attention_output", &attention_output, release());
  m.def("linear_attention_backward_q", &attention_backward_q, release());
  m.def("linear_attention_backward_kv", &attention_backward_kv, release());
  m.def("mapped_attention", &attention_with_map, release());
}
