// Words for what went wrong.
#pragma once
#include <string>

#include "meeting.h"

namespace simt {

std::string name(const Site& site);  // "__syncthreads of norm.cu:12"

}  // namespace simt
