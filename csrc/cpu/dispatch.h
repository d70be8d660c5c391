#pragma once

#include <vector>

#include "kernels.h"
#include "products.h"

namespace windkern {

// Tables this CPU can run, newest instruction set first; never empty.
std::vector<const KernelTable*> runnable_kernels();

// Products of bfloat16 operands with float32 sums, or null where this CPU has no such instruction.
MultiplyBf16 runnable_product();

}  // namespace windkern
