// Picks the newest instruction set that both the build and this CPU have.
#include "dispatch.h"

namespace windkern {
namespace {

bool cpu_has_avx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && cpu_has_avx2();
#else
  return false;
#endif
}

bool cpu_has_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

MultiplyBf16 runnable_product() { return cpu_has_bf16() ? avx512bf16_product() : nullptr; }

std::vector<const KernelTable*> runnable_kernels() {
  std::vector<const KernelTable*> tables;
  if (cpu_has_avx512() && avx512_kernels() != nullptr) tables.push_back(avx512_kernels());
  if (cpu_has_avx2() && avx2_kernels() != nullptr) tables.push_back(avx2_kernels());
  tables.push_back(portable_kernels());
  return tables;
}

}  // namespace windkern
