// Every sum over tokens (S and z forward, dS and dz backward) is taken in two stages over fixed chunks of tokens, so the result is the
// same bits for any number of threads, and one long sequence keeps all threads busy.
#include "linear_attention.h"

#include <cstring>

#include "driver.h"

namespace vit {
namespace {

constexpr int64_t kChunk = 42 * kLinearAttentionRows;  // about a thousand tokens: the sums are a few per cent of what they sum over

// Sums [tasks, dim_pad * value_pad + dim_pad], and what is needed to run the tasks.
struct Plan {
  LinearAttention a;
  int64_t groups, chunks, s_size, size, scratch_size;
  int threads;

  Plan(const LinearAttention& args, int wanted) : a(args) {
    a.dim_pad = (a.dim + 15) / 16 * 16, a.value_pad = (a.value_dim + 15) / 16 * 16;
    groups = a.batch * a.heads;
    chunks = std::max<int64_t>(1, (a.tokens + kChunk - 1) / kChunk);
    s_size = a.dim_pad * a.value_pad, size = s_size + a.dim_pad;
    scratch_size = kLinearAttentionRows * 2 * (a.dim_pad + a.value_pad);
    threads = int(std::clamp<int64_t>(groups * a.tokens * a.dim / 4096, 1, std::max(wanted, 1)));
  }

  // fn(task) for each chunk of each head; S, S' and z are the head's, from `whole` ([groups, 2 * s_size + dim_pad]), may be null.
  void run(Table::LinearAttentionFn fn, const float* whole, float* sums) const {
    const Scratch scratch(threads, scratch_size);
    parallel_for(threads, groups * chunks, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        LinearAttentionTask t{};
        t.head = i / chunks;
        t.begin = i % chunks * kChunk, t.end = std::min(a.tokens, t.begin + kChunk);
        t.scratch = scratch.of(thread);
        if (whole) t.s = whole + t.head * (2 * s_size + a.dim_pad), t.s_transposed = t.s + s_size, t.z = t.s + 2 * s_size;
        if (sums) {
          t.s_sum = sums + i * size, t.z_sum = t.s_sum + s_size;
          std::memset(t.s_sum, 0, size_t(size) * sizeof(float));
        }
        fn(a, t);
      }
    });
  }

  // Adds up the chunks of each head into `whole`, with S' beside S.
  Floats gather(const float* sums) const {
    Floats whole = floats(groups * (2 * s_size + a.dim_pad));
    parallel_for(threads, groups, [&](int64_t begin, int64_t end, int) {
      for (int64_t head = begin; head < end; ++head) {
        float* s = whole.get() + head * (2 * s_size + a.dim_pad);
        ReducePartials r{sums + head * chunks * size, s, DType::f32, chunks, size, 0, s_size};
        table().reduce_partials(r);
        r = {sums + head * chunks * size + s_size, s + 2 * s_size, DType::f32, chunks, size, 0, a.dim_pad};
        table().reduce_partials(r);
        transpose(s);
      }
    });
    return whole;
  }

  // The sums of fn over all tokens, in the form that run() takes.
  Floats total(Table::LinearAttentionFn fn, const float* whole) const {
    const Floats sums = floats(groups * chunks * size);
    run(fn, whole, sums.get());
    return gather(sums.get());
  }

  void transpose(float* s) const {
    float* t = s + s_size;
    for (int64_t i = 0; i < a.dim_pad; ++i)
      for (int64_t j = 0; j < a.value_pad; ++j) t[j * a.dim_pad + i] = s[i * a.value_pad + j];
  }

  // Between the padded form and the one that is kept.
  void keep(const float* whole, float* s, float* z) const {
    for (int64_t head = 0; head < groups; ++head) {
      const float* from = whole + head * (2 * s_size + a.dim_pad);
      for (int64_t i = 0; i < a.dim; ++i) std::copy_n(from + i * a.value_pad, a.value_dim, s + (head * a.dim + i) * a.value_dim);
      std::copy_n(from + 2 * s_size, a.dim, z + head * a.dim);
    }
  }
  Floats restore(const float* s, const float* z) const {
    Floats whole = floats(groups * (2 * s_size + a.dim_pad));
    std::memset(whole.get(), 0, size_t(groups * (2 * s_size + a.dim_pad)) * sizeof(float));
    for (int64_t head = 0; head < groups; ++head) {
      float* to = whole.get() + head * (2 * s_size + a.dim_pad);
      for (int64_t i = 0; i < a.dim; ++i) std::copy_n(s + (head * a.dim + i) * a.value_dim, a.value_dim, to + i * a.value_pad);
      std::copy_n(z + head * a.dim, a.dim, to + 2 * s_size);
      transpose(to);
    }
    return whole;
  }
};

}  // namespace

void linear_attention_forward(LinearAttention args, DType type, float* s, float* z, int threads) {
  const Plan plan(args, threads);
  const auto& fn = table().linear_attention[int(type)];
  const Floats whole = plan.total(fn.state, nullptr);
  plan.run(fn.output, whole.get(), nullptr);
  plan.keep(whole.get(), s, z);
}

void linear_attention_backward(LinearAttention args, DType type, const float* s, const float* z, int threads) {
  const Plan plan(args, threads);
  const auto& fn = table().linear_attention[int(type)];
  plan.run(fn.backward_kv, plan.total(fn.backward_q, plan.restore(s, z).get()).get(), nullptr);
}

void linear_attention_state(LinearAttention args, DType type, float* s, float* z, int threads) {
  const Plan plan(args, threads);
  plan.keep(plan.total(table().linear_attention[int(type)].state, nullptr).get(), s, z);
}

void linear_attention_output(LinearAttention args, DType type, const float* s, const float* z, int threads) {
  const Plan plan(args, threads);
  plan.run(table().linear_attention[int(type)].output, plan.restore(s, z).get(), nullptr);
}

void linear_attention_backward_q(LinearAttention args, DType type, const float* s, const float* z, float* ds, float* dz, int threads) {
  const Plan plan(args, threads);
  plan.keep(plan.total(table().linear_attention[int(type)].backward_q, plan.restore(s, z).get()).get(), ds, dz);
}

void linear_attention_backward_kv(LinearAttention args, DType type, const float* ds, const float* dz, int threads) {
  const Plan plan(args, threads);
  plan.run(table().linear_attention[int(type)].backward_kv, plan.restore(ds, dz).get(), nullptr);
}

}  // namespace vit
