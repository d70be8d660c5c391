// Sums of columns over row tiles, in their order.
#pragma once

#include "launch.h"
#include "launchers.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kAddThreads = 256;

template <class S>
__global__ void __launch_bounds__(kAddThreads) add_tiles(const S* partial, int64_t tiles, int64_t width, S* sums) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  double total = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) total += double(partial[tile * width + column]);
  sums[column] = S(total);
}

template <class S>
void run_add_tiles(const char* name, const S* partial, int64_t tiles, int64_t width, S* sums, Stream stream) {
  WK_RUN(name, add_tiles<S>, ceil_div(width, kAddThreads), dim3(kAddThreads), cudaStream_t(stream), partial, tiles,
         width, sums);
}

}  // namespace
}  // namespace cuda
}  // namespace windkern
