// Sums over segments.
#include "launch.h"
#include "launchers.h"
#include "team.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// One block for each segment. Reason: float64 partial sums are exact to float32 rounding for any length of a segment.
template <class S>
__global__ void __launch_bounds__(kThreads) add_segment(const S* values, const int64_t* bounds, S* sums) {
  __shared__ TeamSlots<double> slots;
  const int64_t first = bounds[blockIdx.x], last = bounds[blockIdx.x + 1];
  double total = 0;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) total += double(values[i]);
  total = over_team(total, slots, Plus{});
  if (threadIdx.x == 0) sums[blockIdx.x] = S(total);
}

template <class S>
void run(const void* values, const int64_t* bounds, int64_t segments, void* sums, Stream stream) {
  WK_RUN("segment_sum", add_segment<S>, segments, dim3(kThreads), cudaStream_t(stream), (const S*)values, bounds,
         (S*)sums);
}

}  // namespace

void segment_sum(DType dtype, const void* values, const int64_t* bounds, int64_t segments, void* sums, Stream stream) {
  if (dtype == DType::float64) return run<double>(values, bounds, segments, sums, stream);
  run<float>(values, bounds, segments, sums, stream);
}

}  // namespace cuda
}  // namespace windkern
