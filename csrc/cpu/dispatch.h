#pragma once

#include <vector>

#include "kernels.h"
#include "products.h"

namespace windkern {

// Tables this CPU can run, newest instruction set first; never empty.
std::vector<const KernelTable*> runnable_kernels();

struct NamedProduct {
  const char* name;
  MultiplyBf16 multiply;
};

// Products of bfloat16 operands with float32 sums this CPU can run, fastest first; empty where it has no instruction.
std::vector<NamedProduct> runnable_products();

}  // namespace windkern
