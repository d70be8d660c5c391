// The end of forward: the results of each row, and the exponentials as backward will see them.
#include "../include/windkern/logprob.h"
#include "../include/windkern/storage.h"
#include "launch.h"
#include "launchers.h"

namespace windkern {
namespace cuda {
namespace {

// A thread has the statistics of each of the block's few rows. Where pivots move, the block rescales row after row.
constexpr int kThreads = 256, kRows = 8;

// Reason: without the bound on blocks, nvcc 13.0 spills a double to leave room for more of them.
template <class S, class E>
__global__ void __launch_bounds__(kThreads, 2) end_rows(const Finish in) {
  __shared__ S factors[kRows], entries[kRows];
  const int64_t first = int64_t(blockIdx.x) * kRows;
  const int here = in.rows - first < kRows ? int(in.rows - first) : kRows;
  if (int(threadIdx.x) < here) {
    const int64_t row = first + threadIdx.x, target = in.targets[row];
    const bool scored = target >= 0;
    const S max = ((const S*)in.max)[row], sum = ((const S*)in.sum)[row], log_sum = log_of_sum(sum);
    const S logp = (((const S*)in.target)[row] - max) - log_sum;
    ((S*)in.log_sum)[row] = log_sum;
    ((S*)in.logps)[row] = scored ? logp : S(0);
    ((S*)in.lse)[row] = scored ? max + log_sum : S(0);
    if (in.pivot != nullptr) {
      const S pivot = ((const S*)in.pivot)[row];
      const S next = in.moves && max > pivot + S(kSettledRoom) ? max : pivot;
      // Reason: exp of the difference of two maxima is exact up to its rounding; exp(lse - pivot) is not.
      const S total = sum * lane_exp(max - next), entry = -one_minus_p(logp) * total;
      // Hazard: the factor of an ignored row can be NaN. Remedy: its zeros stay as they are, like all before any pivot.
      const bool rescales = scored && next != pivot && pivot != minus_infinity<S>();
      ((S*)in.pivot)[row] = next;
      ((S*)in.total)[row] = total;
      ((S*)in.entry)[row] = entry;
      factors[threadIdx.x] = rescales ? lane_exp(pivot - next) : S(1);
      entries[threadIdx.x] = entry;
      // Hazard: two threads write the target's entry if its row is rescaled too. Remedy: there it is set below.
      if (!rescales && scored && target < in.columns) ((E*)in.kept)[row * in.stride + target] = narrowed<E>(entry);
    }
  }
  if (in.pivot == nullptr || !in.moves) return;
  __syncthreads();
  for (int r = 0; r < here; ++r) {
    const S factor = factors[r], entry = entries[r];
    if (factor == S(1)) continue;
    const int64_t target = in.targets[first + r];
    E* kept = (E*)in.kept + (first + r) * in.stride;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < in.columns; i += kThreads) {
      kept[i] = narrowed<E>(i == target ? entry : widened(kept[i]) * factor);
    }
  }
}

template <class S, class E>
void run(const Finish& in, Stream stream) {
  WK_RUN("finish_rows", end_rows<S, E>, ceil_div(in.rows, kRows), dim3(kThreads), cudaStream_t(stream), in);
}

}  // namespace

void finish_rows(const Finish& in, Stream stream) { WK_FOR_DTYPE(in.dtype, run, in, stream) }

}  // namespace cuda
}  // namespace windkern
