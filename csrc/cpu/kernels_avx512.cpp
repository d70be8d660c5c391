// The CPU kernels for AVX-512 (F, BW, VL, DQ); setup.py compiles this file with its own flags.
#define WK_ISA avx512
#include <math.h>
#include <omp.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "pair_loops.h"
#include "rows.h"

namespace windkern {

const KernelTable* avx512_kernels() {
  static const KernelTable table{"avx512",         slab_forward, slab_forward_unit, slab_backward, exps_forward,
                                 exps_backward, column_sums,  segment_sum,       pair_terms,    win_rates};
  return &table;
}

}  // namespace windkern
#else  // built for another kind of CPU
#include "kernels.h"

namespace windkern {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace windkern
#endif
