// Chooses the newest instruction set that both the build and this CPU have.
#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Hazard: Linux kills a process that uses a tile register without permission. Remedy: request permission once.
bool cpu_has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool listed = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);  // AMX-TILE, AMX-BF16
  static const bool granted = listed && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted && cpu_has_bf16();
#else
  return false;
#endif
}

}  // namespace

std::vector<NamedProduct> runnable_products() {
  std::vector<NamedProduct> products;
  if (cpu_has_amx() && amx_product() != nullptr) products.push_back({"amx", amx_product()});
  if (cpu_has_bf16() && avx512bf16_product() != nullptr) products.push_back({"avx512bf16", avx512bf16_product()});
  return products;
}

std::vector<const KernelTable*> runnable_kernels() {
  std::vector<const KernelTable*> tables;
  if (cpu_has_avx512() && avx512_kernels() != nullptr) tables.push_back(avx512_kernels());
  if (cpu_has_avx2() && avx2_kernels() != nullptr) tables.push_back(avx2_kernels());
  tables.push_back(portable_kernels());
  return tables;
}

}  // namespace windkern
