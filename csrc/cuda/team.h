// The threads that share one row: a warp, or a whole block.
#pragma once

#include "../include/windkern/logprob.h"
#include "launch.h"

namespace windkern {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaxTeam = 512;
// Bytes of a row that each thread holds in registers: 16 floats or 8 doubles.
constexpr int kHeldBytes = 64;

// Threads for a row of `width` numbers of `item` bytes: enough to hold it in registers, a power of two up to `most`.
inline int team_size(int64_t width, int item, int most) {
  int team = kWarp;
  while (team < most && int64_t(team) * (kHeldBytes / item) < width) team *= 2;
  return team;
}

// A row of one warp shares its block with others; a wider team is a block.
inline dim3 team_block(int team) { return team == kWarp ? dim3(kWarp, 8) : dim3(team, 1); }

struct Larger {
  template <class S>
  __device__ S operator()(S a, S b) const {
    return lane_max(a, b);
  }
};

struct Plus {
  template <class S>
  __device__ S operator()(S a, S b) const {
    return a + b;
  }
};

template <class S>
struct TeamSlots {
  S values[kMaxTeam / kWarp];
};

// `join` over all threads of the team, the same bits in each; every thread takes part. One TeamSlots serves one call.
template <class S, class Join>
__device__ __forceinline__ S over_team(S value, TeamSlots<S>& slots, Join join) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, apart));
  const int warps = blockDim.x / kWarp;
  if (warps == 1) {
    __syncwarp();  // all earlier reads of the row happen before any lane writes
    return value;
  }
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) slots.values[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = slots.values[lane & (warps - 1)];
  for (int apart = warps / 2; apart > 0; apart /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, apart));
  return value;
}

template <class S>
__device__ __forceinline__ OnlineSoftmax<S> load_state(const ForwardState& state, int64_t row) {
  return {((const S*)state.max)[row], ((const S*)state.sum)[row],
          state.entropy == nullptr ? S(0) : ((const S*)state.entropy)[row]};
}

template <class S>
__device__ __forceinline__ void store_state(const ForwardState& state, int64_t row, const OnlineSoftmax<S>& value) {
  ((S*)state.max)[row] = value.max;
  ((S*)state.sum)[row] = value.sum;
  if (state.entropy != nullptr) ((S*)state.entropy)[row] = value.entropy;
}

// Column of the row's target in this slab, -1 if it lies elsewhere or the row is ignored.
__device__ __forceinline__ int target_column(const Slab& slab, int64_t row) {
  const int64_t column = slab.targets[row] - slab.start;
  return column >= 0 && column < slab.width ? int(column) : -1;
}

}  // namespace cuda
}  // namespace windkern
