// The size of the calling thread's next OpenMP parallel region.
#pragma once

namespace windkern {

// Whether a region must get exactly as many threads as it asks for. By the algorithm of the OpenMP specification
// ("Determining the Number of Threads for a parallel Region"), a team can be smaller only if the number of threads may
// be adjusted dynamically, if regions are nested as deeply as allowed, or if the limit on all threads is near.
bool openmp_team_is_exact();

// The number of threads of the calling thread's next region, as torch.set_num_threads sets it.
void set_num_threads(int threads);

}  // namespace windkern
