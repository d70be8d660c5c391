// Forward that only scores: it reads each entry once, with an online softmax in each thread.
#include "kept.h"
#include "packs.h"
#include "team.h"

namespace windkern {
namespace cuda {
namespace {

// Packs that a thread loads before it uses the first.
template <bool wide>
constexpr int kPacksAtOnce = wide ? 4 : 2;

template <class S, bool wide>
__global__ void __launch_bounds__(kMaxTeam) score(const Slab slab, const Transform<S> t, const ForwardState state) {
  constexpr int size = kPack<S, wide>, at_once = kPacksAtOnce<wide>;
  __shared__ TeamSlots<S> slots[3];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= slab.rows) return;  // whole warps: a block of several rows has one warp per row
  const Columns<wide, size> columns{int(threadIdx.x), int(blockDim.x), int(slab.width)};
  const S* z = (const S*)slab.logits + row * slab.stride;
  const S* bias = (const S*)slab.bias;
  const bool plain = bias == nullptr && t.identity(), wants_entropy = state.entropy != nullptr;
  const int column = target_column(slab, row), packs = columns.packs();
  const S target = threadIdx.x == 0 && column >= 0 ? logit_at(z, bias, column, t) : S(0);

  OnlineSoftmax<S> part{minus_infinity<S>(), S(0), S(0)};
  for (int first = 0; first < packs; first += at_once) {
    S y[at_once][size];
#pragma unroll
    for (int q = 0; q < at_once; ++q) load_pack(z, columns, first + q, minus_infinity<S>(), y[q]);
    if (!plain) {
#pragma unroll
      for (int q = 0; q < at_once; ++q) transform_pack(bias, columns, first + q, t, y[q]);
    }
    OnlineSoftmax<S> here{minus_infinity<S>(), S(0), S(0)};
#pragma unroll
    for (int q = 0; q < at_once; ++q) {
#pragma unroll
      for (int k = 0; k < size; ++k) here.max = lane_max(here.max, y[q][k]);
    }
    const S shift = finite_shift(here.max);
#pragma unroll
    for (int q = 0; q < at_once; ++q) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        const S gap = y[q][k] - shift, e = lane_exp(gap);
        here.sum += e;
        // Hazard: 0 * -inf where a bias masks. Remedy: only entries above 0 count.
        if (wants_entropy) here.entropy += e > S(0) ? e * gap : S(0);
      }
    }
    merge(part, here);
  }

  // Every thread's share is rescaled to the row's maximum, and then summed.
  OnlineSoftmax<S> whole{over_team(part.max, slots[0], Larger{}), S(0), S(0)};
  merge(whole, part);
  whole.sum = over_team(whole.sum, slots[1], Plus{});
  if (wants_entropy) whole.entropy = over_team(whole.entropy, slots[2], Plus{});
  if (threadIdx.x == 0) {
    OnlineSoftmax<S> running = load_state<S>(state, row);
    merge(running, whole);
    store_state(state, row, running);
    if (column >= 0) ((S*)state.target)[row] = target;
  }
}

template <class S>
void run(const Slab& slab, const ForwardState& state, Stream stream) {
  const int width = checked_width(slab.width), team = team_size(width, sizeof(S), kMaxTeam);
  const dim3 block = team_block(team);
  const bool wide = aligned16(slab.logits) && aligned16(slab.bias) && width % kPack<S, true> == 0 &&
                    slab.stride % kPack<S, true> == 0;
  WK_RUN("slab_forward", wide ? score<S, kMayBeWide<S>> : score<S, false>, ceil_div(slab.rows, block.y), block,
         cudaStream_t(stream), slab, Transform<S>(slab), state);
}

}  // namespace

void slab_forward(const Slab& slab, const ForwardState& state, const ForwardOutputs& out, Stream stream) {
  if (out.kept != nullptr) return slab_forward_kept(slab, state, out, stream);
  if (slab.operand == DType::float64) return run<double>(slab, state, stream);
  run<float>(slab, state, stream);
}

}  // namespace cuda
}  // namespace windkern
