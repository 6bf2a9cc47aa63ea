// Fills a Table with this translation unit's copies of the leaf functions.
#pragma once
#include "elementwise.h"
#include "linear_attention.h"
#include "mapped_attention.h"
#include "norm.h"

namespace {

template <class TX, class TY>
void fill_norm(vit::Table& t, int x, int y) {
  t.norm_forward[x][y] = norm_forward<TX, TY>;
  t.norm_backward[x][y] = norm_backward<TX, TY, false>;
  t.norm_backward_from_output[x][y] = norm_backward<TX, TY, true>;
}

template <class T>
void fill_linear_attention(vit::Table& t, int type) {
  t.linear_attention[type] = {linear_attention_state<T>, linear_attention_output<T>, linear_attention_backward_q<T>,
                              linear_attention_backward_kv<T>};
}

template <class T>
void fill_mapped_attention(vit::Table& t, int type) {
  t.mapped_attention[type] = {mapped_attention_pack<T>, mapped_attention_rows<T>};
}

template <class T>
void fill_gelu(vit::Table& t, int type) {
  t.gelu_forward[type] = gelu_forward<T>;
  t.gelu_backward[type] = gelu_backward<T>;
}

template <class TG>
void fill_adamw(vit::Table& t, int grad) {
  t.adamw[grad][0] = adamw<TG, float>;
  t.adamw[grad][1] = adamw<TG, bf16>;
  t.adamw[grad][2] = adamw<TG, f16>;
}

vit::Table make_table(const char* name) {
  vit::Table t{};
  t.name = name;
  t.width = W;
  t.widen = widen_any;
  t.reduce_partials = reduce_partials_any;
  fill_norm<float, float>(t, 0, 0);
  fill_norm<float, bf16>(t, 0, 1);
  fill_norm<float, f16>(t, 0, 2);
  fill_norm<bf16, float>(t, 1, 0);
  fill_norm<bf16, bf16>(t, 1, 1);
  fill_norm<f16, float>(t, 2, 0);
  fill_norm<f16, f16>(t, 2, 2);
  fill_linear_attention<float>(t, 0);
  fill_linear_attention<bf16>(t, 1);
  fill_linear_attention<f16>(t, 2);
  fill_mapped_attention<float>(t, 0);
  fill_mapped_attention<bf16>(t, 1);
  fill_mapped_attention<f16>(t, 2);
  fill_gelu<float>(t, 0);
  fill_gelu<bf16>(t, 1);
  fill_gelu<f16>(t, 2);
  fill_adamw<float>(t, 0);
  fill_adamw<bf16>(t, 1);
  fill_adamw<f16>(t, 2);
  return t;
}

}  // namespace
