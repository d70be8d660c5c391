// The CPU kernels for AVX2, FMA and F16C; setup.py compiles this file with its own flags.
#define WK_ISA avx2
#include <math.h>
#include <omp.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "pair_loops.h"
#include "rows.h"

namespace windkern {

const KernelTable* avx2_kernels() {
  static const KernelTable table{"avx2",         slab_forward, slab_forward_unit, slab_backward, exps_forward,
                                 exps_backward, column_sums,  segment_sum,       pair_terms,    win_rates};
  return &table;
}

}  // namespace windkern
#else  // built for another kind of CPU
#include "kernels.h"

namespace windkern {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace windkern
#endif
