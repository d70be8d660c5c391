// What OpenMP promises the calling thread about its next parallel region.
#pragma once

namespace windkern {

// Whether a region that asks for any number of threads must get exactly that many. By the algorithm of the OpenMP
// specification ("Determining the Number of Threads for a parallel Region") a team can be smaller only if the number of
// threads may be adjusted, if regions already are as deep as they may be, or if a limit on all threads is near.
bool openmp_team_is_exact();

// The number of threads of the calling thread's next region, as torch.set_num_threads sets it.
void set_num_threads(int threads);

}  // namespace windkern
