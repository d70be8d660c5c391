// The table of CPU kernels built for one instruction set; dispatch.cpp chooses one at run time.
#pragma once

#include "../include/windkern/arguments.h"

namespace windkern {

struct KernelTable {
  const char* name;
  void (*slab_forward)(const Slab&, const ForwardState&, const ForwardOutputs&);
  void (*slab_forward_unit)(const Slab&, const ForwardState&, const UnitOutputs&);
  void (*slab_backward)(const Slab&, const BackwardInputs&);
  void (*exps_forward)(const Slab&, const ForwardState&, const ExpsOutputs&);
  void (*exps_backward)(const Slab&, const ExpsInputs&);
  void (*column_sums)(const ColumnSums&);
  void (*segment_sum)(DType, const void* values, const int64_t* bounds, int64_t segments, void* sums, int threads);
  void (*pair_terms)(const Pairs&, void* value, void* slope);  // (groups,) and (groups, n)
  void (*win_rates)(const Pairs&, void* rates);                // (groups, n)
};

const KernelTable* portable_kernels();
const KernelTable* avx2_kernels();    // null if the build or the CPU has none
const KernelTable* avx512_kernels();

}  // namespace windkern
