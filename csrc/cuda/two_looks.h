// Forward kernels that write every entry, which need the row's maximum before the first exp. A thread keeps the first
// 64 bytes of its share in registers, so that a row of up to 64 bytes times its team is read once. The rest of a wider
// row is read again from the second-level cache, which holds the rows in flight on all multiprocessors.
#pragma once

#include "launchers.h"
#include "packs.h"
#include "team.h"

namespace windkern {
namespace cuda {

// The look() of an output that overwrites nothing.
struct Nothing {};

// An Output has look() to read what it will overwrite, begin() with the row's maxima and that, write() for a pack,
// at_target() for the thread that wrote the target's column, and end(). kTeam and kBlocks bound its registers: several
// blocks share a multiprocessor, so that one loads while another computes.
template <class S, class E, bool wide, class Output>
__global__ void __launch_bounds__(Output::kTeam, Output::kBlocks)
    two_looks(const Slab slab, const Transform<S> t, const ForwardState state, Output output) {
  // Unaligned rows, which only the last slab of a vocabulary has, are read twice: single columns need an address each.
  constexpr int size = kPack<E, wide>, held = wide ? kHeldBytes / int(sizeof(S)) / size : 0;
  __shared__ TeamSlots<S> slots[3];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= slab.rows) return;  // whole warps: a block of several rows has one warp per row
  const Columns<wide, size> columns{int(threadIdx.x), int(blockDim.x), int(slab.width)};
  const S* z = (const S*)slab.logits + row * slab.stride;
  const S* bias = (const S*)slab.bias;
  const bool plain = bias == nullptr && t.identity(), wants_entropy = state.entropy != nullptr;
  const int column = target_column(slab, row), packs = columns.packs();
  // Hazard: the output may overwrite the slab. Remedy: the target is read here, before the team's first barrier.
  const S target = threadIdx.x == 0 && column >= 0 ? logit_at(z, bias, column, t) : S(0);

  S y[held + 1][size];  // the last one is not used: C++ has no empty arrays
#pragma unroll
  for (int p = 0; p < held; ++p) load_pack(z, columns, p, minus_infinity<S>(), y[p]);
  if (!plain) {
#pragma unroll
    for (int p = 0; p < held; ++p) transform_pack(bias, columns, p, t, y[p]);
  }
  OnlineSoftmax<S> part{minus_infinity<S>(), S(0), S(0)};
#pragma unroll
  for (int p = 0; p < held; ++p) {
#pragma unroll
    for (int k = 0; k < size; ++k) part.max = lane_max(part.max, y[p][k]);
  }
  for (int p = held; p < packs; ++p) {
    S more[size];
    load_pack(z, columns, p, minus_infinity<S>(), more);
    if (!plain) transform_pack(bias, columns, p, t, more);
#pragma unroll
    for (int k = 0; k < size; ++k) part.max = lane_max(part.max, more[k]);
  }
  OnlineSoftmax<S> running = load_state<S>(state, row);
  const auto looked = output.look(row);  // before the barrier, like every read of what is overwritten below
  part.max = over_team(part.max, slots[0], Larger{});
  const S shift = finite_shift(part.max);
  output.begin(row, part.max, running.max, looked);

  const auto look = [&](int p, const S(&entries)[size]) {
    S e[size];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const S gap = entries[k] - shift;
      e[k] = lane_exp(gap);
      part.sum += e[k];
      // Hazard: 0 * -inf where a bias masks. Remedy: only entries above 0 count.
      if (wants_entropy) part.entropy += e[k] > S(0) ? e[k] * gap : S(0);
    }
    output.write(columns, p, entries, e, shift);
  };
#pragma unroll
  for (int p = 0; p < held; ++p) look(p, y[p]);
  for (int p = held; p < packs; ++p) {
    S more[size];
    load_pack(z, columns, p, minus_infinity<S>(), more);
    if (!plain) transform_pack(bias, columns, p, t, more);
    look(p, more);
  }
  if (column >= 0 && columns.owns(column)) output.at_target(column);

  part.sum = over_team(part.sum, slots[1], Plus{});
  if (wants_entropy) part.entropy = over_team(part.entropy, slots[2], Plus{});
  if (threadIdx.x == 0) {
    const MergeFactors<S> factors = merge(running, part);
    store_state(state, row, running);
    if (column >= 0) ((S*)state.target)[row] = target;
    output.end(row, factors);
  }
}

template <class S, class E, class Output>
void launch_two_looks(const char* name, const Slab& slab, const ForwardState& state, const Output& output,
                      bool aligned, Stream stream) {
  const int width = checked_width(slab.width), team = team_size(width, sizeof(S), Output::kTeam);
  const dim3 block = team_block(team);
  const bool wide = aligned && aligned16(slab.logits) && aligned16(slab.bias) && width % kPack<E, true> == 0 &&
                    slab.stride % kPack<S, true> == 0;
  const auto kernel = wide ? two_looks<S, E, kMayBeWide<S>, Output> : two_looks<S, E, false, Output>;
  WK_RUN(name, kernel, ceil_div(slab.rows, block.y), block, cudaStream_t(stream), slab, Transform<S>(slab), state,
         output);
}

}  // namespace cuda
}  // namespace windkern
