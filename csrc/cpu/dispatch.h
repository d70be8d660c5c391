#pragma once

#include <vector>

#include "kernels.h"

namespace windkern {

// Tables this CPU can run, newest instruction set first; never empty.
std::vector<const KernelTable*> runnable_kernels();

}  // namespace windkern
