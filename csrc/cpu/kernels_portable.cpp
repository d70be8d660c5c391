// The CPU kernels for any CPU; setup.py compiles this file with its own flags.
#define WK_ISA portable
#include <math.h>
#include <omp.h>

#include "pair_loops.h"
#include "rows.h"

namespace windkern {

const KernelTable* portable_kernels() {
  static const KernelTable table{"portable",         slab_forward, slab_forward_unit, slab_backward, exps_forward,
                                 exps_backward, column_sums,  segment_sum,       pair_terms,    win_rates};
  return &table;
}

}  // namespace windkern
