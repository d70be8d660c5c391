// Logits of a tile in the registers of the threads that multiplied them: the transform, and statistics of their rows.
//
// A thread has two rows, eight apart, and 64 columns of each, which it shares with the three other lanes of its four.
#pragma once

#include "team.h"
#include "tiles.h"

namespace windkern {
namespace cuda {

// The columns of a tile that a thread holds.
struct HeldColumns {
  int first, width;  // of the tile's first column, and of the slab

  __device__ __forceinline__ bool cut() const { return first + kTileColumns > width; }
  __device__ __forceinline__ int at(int j, int i) const { return first + 8 * j + 2 * (int(threadIdx.x) % 4) + i; }
};

// The largest and the sum of four lanes' values.
__device__ __forceinline__ float largest_of_four(float value) {
  value = lane_max(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return lane_max(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ __forceinline__ float sum_of_four(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// 2^x within 2 units in the last place, 0 where it is below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return lane_exp(x * 0.69314718f);
#endif
}

// exp(y - reference), exactly 1 at the reference: the reference in units of log(2) is two numbers, since rounding it to one
// would change the exponentials of large logits.
struct ExpsFrom {
  float high, low;

  __device__ __forceinline__ explicit ExpsFrom(float reference) : high(-reference * kLog2E) {
    low = -fmaf(reference, kLog2E, high);
  }
  __device__ __forceinline__ float operator()(float y) const { return power_of_two(fmaf(y, kLog2E, high) + low); }

  static constexpr float kLog2E = 1.4426950408889634f;
};

// Changes all logits of a tile, given their column's j and i. Reason: without the fence the compiler would begin with all
// columns at once, for which there are no registers.
template <class Change>
__device__ __forceinline__ void change_tile(float (&acc)[128], const Change& change) {
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    asm volatile("" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) change(j, i, acc[4 * j + i], acc[4 * j + 2 + i]);
  }
}

// Adds the bias and transforms; columns outside the slab become -inf, entries that a bias masks stay -inf. Without a
// softcap, whose branches cost registers: such walks run slab by slab.
__device__ __forceinline__ void transform_tile(float (&acc)[128], const HeldColumns& columns, const Slab& slab,
                                               const Transform<float>& t) {
  const float lowest = minus_infinity<float>();
  if (const float* const bias = (const float*)slab.bias; bias != nullptr) {
    change_tile(acc, [&](int j, int i, float& y0, float& y1) {
      const int column = columns.at(j, i);
      const float b = bias[column < columns.width ? column : columns.width - 1];
      y0 += b, y1 += b;
    });
  }
  if (!t.identity()) {
    change_tile(acc, [&](int, int, float& y0, float& y1) {
      y0 = y0 == lowest ? lowest : y0 * t.slope_at_zero();
      y1 = y1 == lowest ? lowest : y1 * t.slope_at_zero();
    });
  }
  if (columns.cut()) {
    change_tile(acc, [&](int j, int i, float& y0, float& y1) {
      if (columns.at(j, i) >= columns.width) y0 = y1 = lowest;
    });
  }
}

// The largest logit of each of the two rows.
__device__ __forceinline__ void largest_of_rows(const float (&acc)[128], float (&most)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) most[h] = lane_max(acc[2 * h], acc[2 * h + 1]);
#pragma unroll
  for (int j = 1; j < 32; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) most[h] = lane_max(most[h], lane_max(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) most[h] = largest_of_four(most[h]);
}

// The column of a row's target in the tile, or -1 where another thread or no thread of the tile has it.
__device__ __forceinline__ int held_target(int64_t target, const Slab& slab, const HeldColumns& columns) {
  const int64_t column = target - slab.start - columns.first;
  const bool inside = target >= 0 && column >= 0 && column < kTileColumns && columns.first + column < columns.width;
  return inside && int(column) % 8 / 2 == int(threadIdx.x) % 4 ? int(column) : -1;
}

// The value of one of a row's columns, by its number in the tile.
__device__ __forceinline__ float value_at(const float (&acc)[128], int h, int column) {
  float found = 0.0f;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    const float even = acc[4 * j + 2 * h], odd = acc[4 * j + 2 * h + 1];
    if (j == column / 8) found = column % 2 == 0 ? even : odd;
  }
  return found;
}

// Statistics of the rows of all tiles: (column tiles, rows).
struct TileParts {
  float *max, *sum, *entropy;  // relative to max; entropy may be null

  TileParts(const Slab& slab, bool wants_entropy, float* parts)
      : max(parts), sum(parts + part(slab)), entropy(wants_entropy ? parts + 2 * part(slab) : nullptr) {}

  static int64_t part(const Slab& slab) { return column_tiles(slab) * slab.rows; }

  __device__ __forceinline__ OnlineSoftmax<float> at(int64_t place) const {
    return {max[place], sum[place], entropy == nullptr ? 0.0f : entropy[place]};
  }
};

// The running statistics of a row; those of no entry if the walk begins.
__device__ __forceinline__ OnlineSoftmax<float> begin_state(const ForwardState& state, int64_t row, bool fresh) {
  return fresh ? OnlineSoftmax<float>{minus_infinity<float>(), 0.0f, 0.0f} : load_state<float>(state, row);
}

constexpr int kJoinRows = 32, kJoinRuns = 8;

// Merges the tiles of each row of a block (kJoinRows, kJoinRuns) in a fixed order: each thread a run of them, then the
// first thread of a row its runs. Returns the statistics of the row there.
__device__ __forceinline__ OnlineSoftmax<float> join_tiles(const TileParts& parts, int row, int rows, int count) {
  __shared__ OnlineSoftmax<float> runs[kJoinRuns][kJoinRows];
  const int each = (count + kJoinRuns - 1) / kJoinRuns, first = int(threadIdx.y) * each;
  const int last = first + each < count ? first + each : count;
  OnlineSoftmax<float> run{minus_infinity<float>(), 0.0f, 0.0f};
  if (row < rows) {
#pragma unroll 4
    for (int tile = first; tile < last; ++tile) merge(run, parts.at(int64_t(tile) * rows + row));
  }
  runs[threadIdx.y][threadIdx.x] = run;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int other = 1; other < kJoinRuns; ++other) merge(run, runs[other][threadIdx.x]);
  }
  return run;
}

}  // namespace cuda
}  // namespace windkern
