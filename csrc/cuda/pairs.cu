// All ordered pairs of each group in O(n) memory. A warp has four responses i in registers and visits every j, which
// come through shared memory one tile at a time, once for all warps of the block.
#include "../include/windkern/pairs.h"

#include "launch.h"
#include "launchers.h"
#include "team.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kRows = 4;                    // responses i of one warp
constexpr int kWarps = 8;                   // of one block, fewer for small groups
constexpr int kBlockRows = kRows * kWarps;  // responses i of a full block
constexpr int kTile = 512;                  // responses j in shared memory

template <class S>
__device__ __forceinline__ S over_warp(S value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

template <class S>
struct Tile {
  S scores[kTile], rewards[kTile];
  bool counted[kTile];
};

// Calls visit(r, i, j, score of j, chances of i against j) for the counted j of the warp's row r, j == i included, with
// lanes over j. `scores` may be null. Every thread of the block must call this.
template <class S, Link link, class Visit>
__device__ __forceinline__ void meet_all(const Pairs& in, int64_t group, int first, Tile<S>& tile, Visit visit) {
  const int n = int(in.n);
  const int64_t base = group * n;
  const S* const rewards = in.rewards == nullptr ? nullptr : (const S*)in.rewards + base;
  const S* const prefs = in.prefs == nullptr ? nullptr : (const S*)in.prefs + (base + first) * n;
  const int lane = threadIdx.x % kWarp;
  S own[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) own[r] = rewards != nullptr && first + r < n ? rewards[first + r] : S(0);
  for (int start = 0; start < n; start += kTile) {
    const int count = n - start < kTile ? n - start : kTile;
    __syncthreads();
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      if (in.scores != nullptr) tile.scores[j] = ((const S*)in.scores)[base + start + j];
      if (rewards != nullptr) tile.rewards[j] = rewards[start + j];
      tile.counted[j] = in.where == nullptr || in.where[base + start + j];
    }
    __syncthreads();
    for (int j = lane; j < count; j += kWarp) {
      if (!tile.counted[j]) continue;
      const S score = in.scores == nullptr ? S(0) : tile.scores[j];
      const S reward = rewards == nullptr ? S(0) : tile.rewards[j];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r >= n) continue;
        const Chances<S> chances = prefs == nullptr ? chances_of<link>(S(own[r] - reward))
                                                    : chances_from(prefs[int64_t(r) * n + start + j]);
        visit(r, first + r, start + j, score, chances);
      }
    }
  }
}

// The warp's first response; the blocks of one group are adjacent.
__device__ __forceinline__ int first_row(int tiles) {
  return int((blockIdx.x % tiles) * (blockDim.x / kWarp) + threadIdx.x / kWarp) * kRows;
}

template <class S, Link link, PairLoss loss>
__global__ void __launch_bounds__(kWarps * kWarp, 1)
    meet_for_loss(const Pairs in, int tiles, double* partial, S* slope) {
  __shared__ Tile<S> tile;
  __shared__ double warp_values[kWarps];
  const int64_t group = blockIdx.x / tiles;
  const int first = first_row(tiles), n = int(in.n);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  S own[kRows], values[kRows], slopes[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    own[r] = first + r < n ? ((const S*)in.scores)[group * n + first + r] : S(0);
    values[r] = slopes[r] = S(0);
  }
  meet_all<S, link>(in, group, first, tile, [&](int r, int i, int j, S score, const Chances<S>& chances) {
    if (i == j) return;
    S value, d_score;
    pair_value_slope<loss>(S(own[r] - score), chances, value, d_score);
    values[r] += value;
    slopes[r] += d_score;
  });
  double total = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = first + r;
    const double row_value = over_warp(double(values[r]));
    const S row_slope = over_warp(slopes[r]);
    if (i >= n) continue;
    // Hazard: a masked score can be NaN or inf. Remedy: leave its row out, never multiply by 0.
    const bool counts = in.where == nullptr || in.where[group * n + i];
    if (counts) total += row_value;
    if (lane == 0) slope[group * n + i] = counts ? row_slope : S(0);
  }
  if (lane == 0) warp_values[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    double block_value = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) block_value += warp_values[w];
    partial[blockIdx.x] = block_value;
  }
}

// One warp per group sums the values of its blocks in a fixed order.
template <class S>
__global__ void __launch_bounds__(kWarp) add_values(const double* partial, int tiles, S* value) {
  const int64_t group = blockIdx.x;
  double total = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += kWarp) total += partial[group * tiles + tile];
  total = over_warp(total);
  if (threadIdx.x == 0) value[group] = S(total);
}

template <class S, Link link>
__global__ void __launch_bounds__(kWarps * kWarp, 1) meet_for_rates(const Pairs in, int tiles, S* rates) {
  __shared__ Tile<S> tile;
  const int64_t group = blockIdx.x / tiles;
  const int first = first_row(tiles), n = int(in.n);
  S wins[kRows], counts[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) wins[r] = counts[r] = S(0);
  meet_all<S, link>(in, group, first, tile, [&](int r, int i, int j, S, const Chances<S>& chances) {
    wins[r] += i == j ? S(0.5) : chances.win;
    counts[r] += S(1);
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = first + r;
    const S won = over_warp(wins[r]), met = over_warp(counts[r]);
    if (i >= n || threadIdx.x % kWarp != 0) continue;
    const bool count = in.where == nullptr || in.where[group * n + i];
    rates[group * n + i] = count ? won / met : S(0);
  }
}

int checked_tiles(int64_t n) {
  if (n > (int64_t(1) << 30)) {
    throw std::invalid_argument("a group must have up to 2^30 responses, got " + std::to_string(n));
  }
  return int(pair_tiles(n));
}

// Threads of a block for groups of n: a warp for every four responses.
dim3 block_of(int64_t n) {
  int warps = 1;
  while (warps < kWarps && warps * kRows < n) warps *= 2;
  return dim3(warps * kWarp);
}

template <class S, Link link, PairLoss loss>
void run_loss(const Pairs& in, S* value, S* slope, double* scratch, Stream stream) {
  const int tiles = checked_tiles(in.n);
  const auto kernel = meet_for_loss<S, link, loss>;
  WK_RUN("pair_terms", kernel, in.groups * tiles, block_of(in.n), cudaStream_t(stream), in, tiles, scratch, slope);
  WK_RUN("pair_terms (value)", add_values<S>, in.groups, dim3(kWarp), cudaStream_t(stream), scratch, tiles, value);
}

template <class S, Link link>
void run_link(const Pairs& in, S* value, S* slope, double* scratch, Stream stream) {
  switch (PairLoss(in.loss)) {
    case PairLoss::square: return run_loss<S, link, PairLoss::square>(in, value, slope, scratch, stream);
    case PairLoss::logistic: return run_loss<S, link, PairLoss::logistic>(in, value, slope, scratch, stream);
    case PairLoss::hinge: return run_loss<S, link, PairLoss::hinge>(in, value, slope, scratch, stream);
  }
}

template <class S>
void run_terms(const Pairs& in, void* value, void* slope, double* scratch, Stream stream) {
  if (Link(in.link) == Link::step) return run_link<S, Link::step>(in, (S*)value, (S*)slope, scratch, stream);
  run_link<S, Link::bradley_terry>(in, (S*)value, (S*)slope, scratch, stream);
}

template <class S>
void run_rates(const Pairs& in, S* rates, Stream stream) {
  const int tiles = checked_tiles(in.n);
  const auto kernel =
      Link(in.link) == Link::step ? meet_for_rates<S, Link::step> : meet_for_rates<S, Link::bradley_terry>;
  WK_RUN("win_rates", kernel, in.groups * tiles, block_of(in.n), cudaStream_t(stream), in, tiles, rates);
}

}  // namespace

int64_t pair_tiles(int64_t n) { return ceil_div(n, kBlockRows); }

void pair_terms(const Pairs& in, void* value, void* slope, double* scratch, Stream stream) {
  if (in.dtype == DType::float64) return run_terms<double>(in, value, slope, scratch, stream);
  run_terms<float>(in, value, slope, scratch, stream);
}

void win_rates(const Pairs& in, void* rates, Stream stream) {
  if (in.dtype == DType::float64) return run_rates(in, (double*)rates, stream);
  run_rates(in, (float*)rates, stream);
}

}  // namespace cuda
}  // namespace windkern
