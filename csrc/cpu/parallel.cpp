// Threads are torch's own, not ours. A second pool beside torch's would fight it for cores: its workers spin for a while after
// each parallel region. Nor do we link an OpenMP runtime, which might turn out to be a second copy. Instead we ask the process
// for GOMP_parallel, the entry point behind every `#pragma omp parallel` that gcc compiles and that LLVM's runtime offers too;
// torch has loaded it for all to see by the time this module is imported. Where there is none, plain threads do.
#include "parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace vit {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetInt = int (*)();

struct Runtime {
  GompParallel parallel;
  GetInt thread_num, num_threads, in_parallel;
};

const Runtime& runtime() {
  static const Runtime r = {
      reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
      reinterpret_cast<GetInt>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
      reinterpret_cast<GetInt>(dlsym(RTLD_DEFAULT, "omp_get_num_threads")),
      reinterpret_cast<GetInt>(dlsym(RTLD_DEFAULT, "omp_in_parallel")),
  };
  return r;
}

bool usable(const Runtime& r) { return r.parallel && r.thread_num && r.num_threads && r.in_parallel; }

struct Job {
  RangeFn fn;
  void* context;
  int64_t tasks;
  int parts;
};

void run_part(const Job& job, int part) {
  const int64_t begin = job.tasks * part / job.parts, end = job.tasks * (part + 1) / job.parts;
  if (begin < end) job.fn(job.context, begin, end, part);
}

// A team may be smaller than asked for: each member then takes several parts, and the parts stay the same.
void team_member(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  const int step = runtime().num_threads();
  for (int part = runtime().thread_num(); part < job.parts; part += step) run_part(job, part);
}

}  // namespace

void parallel_ranges(int threads, int64_t tasks, RangeFn fn, void* context) {
  if (tasks <= 0) return;
  const int parts = int(tasks < threads ? tasks : (threads < 1 ? 1 : threads));
  Job job{fn, context, tasks, parts};
  const Runtime& r = runtime();
  if (parts == 1 || (usable(r) && r.in_parallel())) {
    for (int part = 0; part < parts; ++part) run_part(job, part);
  } else if (usable(r)) {
    r.parallel(team_member, &job, unsigned(parts), 0);
  } else {
    std::vector<std::thread> others;
    for (int part = 1; part < parts; ++part) others.emplace_back([&job, part] { run_part(job, part); });
    run_part(job, 0);
    for (auto& t : others) t.join();
  }
}

const char* threading() { return usable(runtime()) ? "torch's OpenMP" : "own threads"; }

}  // namespace vit
