#include "openmp.h"

#include <limits.h>
#include <omp.h>

namespace windkern {

bool openmp_team_is_exact() {
  return !omp_get_dynamic() && omp_get_level() == 0 && omp_get_max_active_levels() > 0 &&
         omp_get_thread_limit() == INT_MAX;
}

void set_num_threads(int threads) { omp_set_num_threads(threads); }

}  // namespace windkern
