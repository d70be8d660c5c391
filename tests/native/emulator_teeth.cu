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

// The rest runs under the watcher of shared memory. Each thread of these is right in both fixed orders.

// The value is the same whoever comes last.
__global__ void writes_one_place_twice(int* out) {
  __shared__ int last;
  last = 7;
  __syncthreads();
  out[threadIdx.x] = last;
}

// Nobody reads too late in this emulator: a thread runs up to its barrier.
__global__ void overwrites_what_is_read(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 63) out[0] = values[0];
  if (threadIdx.x == 0) values[0] = 1;
}

__global__ void adds_up_without_order(int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  sum += 1;
  __syncthreads();
  out[threadIdx.x] = sum;
}

// A warp that works in step on one GPU need not on another.
__global__ void hands_over_inside_a_warp(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void reads_the_last_block(int* out) {
  __shared__ int values[64];
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void __launch_bounds__(32, 2) has_a_bound(int* out) { out[threadIdx.x] = 1; }

struct alignas(16) Four {
  int v[4];
};

__global__ void loads_four(const int* from, int* out) {
  const Four four = *reinterpret_cast<const Four*>(from + threadIdx.x % 2);
  out[threadIdx.x] = four.v[3];
}

// Neighbours of a warp, then of the block, with a barrier for each and one before the next write.
__global__ void is_right(int* out) {
  __shared__ int values[64];
  __shared__ bool flags[64];
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = int(threadIdx.x);
    flags[threadIdx.x] = true;
    __syncwarp();
    const int beside = values[threadIdx.x ^ 1];
    __syncthreads();
    if (flags[63 - threadIdx.x]) out[threadIdx.x] = beside + values[63 - threadIdx.x];
    __syncthreads();
  }
}

int main(int, char** arguments) {
  alignas(16) int out[64] = {}, from[8] = {};
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  try {
    if (is("ends")) WK_LAUNCH(ends_before_a_barrier, 1, 64, nullptr)(out);
    if (is("branch")) WK_LAUNCH(waits_in_one_branch, 1, 64, nullptr)(out);
    if (is("part")) WK_LAUNCH(shuffles_in_part_of_a_warp, 1, 64, nullptr)(out);
    if (is("race")) WK_LAUNCH(reads_without_a_barrier, 1, 64, nullptr)(out);
    if (is("twice")) WK_LAUNCH(writes_one_place_twice, 1, 64, nullptr)(out);
    if (is("overwritten")) WK_LAUNCH(overwrites_what_is_read, 1, 64, nullptr)(out);
    if (is("sum")) WK_LAUNCH(adds_up_without_order, 1, 64, nullptr)(out);
    if (is("warp")) WK_LAUNCH(hands_over_inside_a_warp, 1, 64, nullptr)(out);
    if (is("last block")) WK_LAUNCH(reads_the_last_block, 2, 64, nullptr)(out);
    if (is("bound")) WK_LAUNCH(has_a_bound, 1, 64, nullptr)(out);
    if (is("aligned")) WK_LAUNCH(loads_four, 1, 64, nullptr)(from, out);
    if (is("right")) WK_LAUNCH(is_right, 2, 64, nullptr)(out);
  } catch (const std::logic_error& error) {
    std::puts(error.what());
    return 0;
  }
  int sum = 0;
  for (int k = 0; k < 64; ++k) sum = 31 * sum % 1000003 + out[k];
  std::printf("%d\n", sum);
}
