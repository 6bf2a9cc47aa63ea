#include "report.h"

#include <dlfcn.h>
#include <unwind.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "block.h"

namespace simt {
namespace {

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::vector<uintptr_t> callers() {
  std::vector<uintptr_t> out;
  const auto note = [](_Unwind_Context* context, void* to) {
    auto& list = *static_cast<std::vector<uintptr_t>*>(to);
    if (const uintptr_t address = _Unwind_GetIP(context)) list.push_back(address - 1);  // of the call, not of what follows it
    return list.size() < 24 ? _URC_NO_REASON : _URC_END_OF_STACK;
  };
  _Unwind_Backtrace(note, &out);
  return out;
}

// "norm.cu:57", the innermost line of CUDA code that the running thread is in, as addr2line finds it; "" where it finds none.
std::string line_of_kernel() {
  Dl_info module;
  if (!dladdr(reinterpret_cast<void*>(&line_of_kernel), &module)) return "";
  std::string command = std::string("addr2line -i -e '") + module.dli_fname + "'";
  char text[400];
  for (uintptr_t address : callers()) {
    std::snprintf(text, sizeof text, " %#zx", size_t(address - reinterpret_cast<uintptr_t>(module.dli_fbase)));
    command += text;
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  std::string found;
  while (pipe && std::fgets(text, sizeof text, pipe)) {
    const std::string line = base_name(text);
    if (found.empty() && line.find(".cu") != std::string::npos) found = line.substr(0, line.find_first_of(" \n"));
  }
  if (pipe) pclose(pipe);
  return found;
}

}  // namespace

std::string name(const Site& site) { return std::string(site.operation) + " of " + base_name(site.file) + ":" + std::to_string(site.line); }

void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!block.running()) throw std::runtime_error(text);
  block.give_up(line_of_kernel() + ": thread " + std::to_string(here.thread) + " " + text);
}

}  // namespace simt
