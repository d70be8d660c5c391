// Finds the rows that are scored, and tells the host their number: one launch and one wait.
#include "launchers.h"
#include "team.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kThreads = 1024;

// One block, which goes down the targets.
__global__ void __launch_bounds__(kThreads)
    find(const int64_t* targets, int64_t ignored, int64_t rows, int64_t* positions, int64_t* count) {
  __shared__ int of_warps[kThreads / kWarp];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int64_t found = 0;
  for (int64_t first = 0; first < rows; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const bool scored = row < rows && targets[row] != ignored;
    int before = 0, total = scored ? 1 : 0;  // in the lanes that differ from this one in the bits seen so far
#pragma unroll
    for (int apart = 1; apart < kWarp; apart *= 2) {
      const int others = __shfl_xor_sync(0xffffffffu, total, apart);
      if (lane & apart) before += others;
      total += others;
    }
    if (lane == 0) of_warps[warp] = total;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w == warp) before += all;
      all += of_warps[w];
    }
    if (scored) positions[found + before] = row;
    found += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) *count = found;
}

}  // namespace

int64_t find_scored(const int64_t* targets, int64_t ignored, int64_t rows, int64_t* positions, int64_t* count,
                    Stream stream) {
  WK_RUN("find_scored", find, 1, dim3(kThreads), cudaStream_t(stream), targets, ignored, rows, positions, count);
  WK_CHECK(cudaStreamSynchronize(cudaStream_t(stream)));
  return *count;
}

}  // namespace cuda
}  // namespace windkern
