// Kernels with the faults the emulator is there to find; the first argument names one.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

__global__ void ends_before_a_barrier(int*) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

__global__ void waits_in_one_branch(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffles_in_part_of_a_warp(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
}

// Without the barrier a thread sees its neighbour's value only if that ran first.
__global__ void reads_without_a_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = -1;
  __syncthreads();
  values[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

int main(int, char** arguments) {
  int out[64] = {};
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  try {
    if (is("ends")) WK_LAUNCH(ends_before_a_barrier, 1, 64, nullptr)(out);
    if (is("branch")) WK_LAUNCH(waits_in_one_branch, 1, 64, nullptr)(out);
    if (is("part")) WK_LAUNCH(shuffles_in_part_of_a_warp, 1, 64, nullptr)(out);
    if (is("race")) WK_LAUNCH(reads_without_a_barrier, 1, 64, nullptr)(out);
  } catch (const std::logic_error& error) {
    std::puts(error.what());
    return 0;
  }
  int sum = 0;
  for (int value : out) sum += value;
  std::printf("%d\n", sum);
}
