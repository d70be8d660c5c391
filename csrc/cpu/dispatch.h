#pragma once

#include <vector>

#include "kernels.h"
#include "products.h"

namespace windkern {

// The tables that this CPU can run, newest instruction set first; never empty.
std::vector<const KernelTable*> runnable_kernels();

struct NamedProduct {
  const char* name;
  MultiplyBf16 multiply;
};

// The products of bfloat16 operands with float32 sums that this CPU can run, fastest first; empty if there are none.
std::vector<NamedProduct> runnable_products();

}  // namespace windkern
