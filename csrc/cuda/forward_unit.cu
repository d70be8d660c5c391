// Forward that writes the GEMM operands of the frozen-head gradient.
#include "two_looks.h"

namespace windkern {
namespace cuda {
namespace {

template <class S, class E>
struct UnitOutput {
  static constexpr int kTeam = kMaxTeam / 2, kBlocks = 1;  // 64 registers would spill
  E *unit, *logged;  // may be the slab itself; logged is null without entropy
  S *rescale, *max_step;
  int64_t unit_stride, logged_stride;
  Transform<S> t;
  S factor, step;  // of this row, from begin()

  __device__ Nothing look(int64_t) const { return {}; }

  __device__ void begin(int64_t row, S slab_max, S old_max, Nothing) {
    const S new_max = finite_shift(lane_max(old_max, slab_max));
    factor = lane_exp(slab_max - new_max) * S(1 << kept_binades<E>);
    step = slab_max == minus_infinity<S>() ? S(0) : slab_max - new_max;
    unit += row * unit_stride;
    if (logged != nullptr) logged += row * logged_stride;
    if (threadIdx.x == 0 && max_step != nullptr) {
      max_step[row] = old_max == minus_infinity<S>() ? S(0) : old_max - new_max;
    }
  }

  template <class Columns, int size>
  __device__ void write(const Columns& columns, int p, const S (&y)[size], const S (&e)[size], S shift) const {
    S weighted[size];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      weighted[k] = e[k] * factor;
      if (t.capped()) weighted[k] *= relative_slope(y[k], t);
    }
    store_pack(unit, columns, p, weighted);
    if (logged == nullptr) return;
#pragma unroll
    for (int k = 0; k < size; ++k) weighted[k] = e[k] > S(0) ? weighted[k] * ((y[k] - shift) + step) : S(0);
    store_pack(logged, columns, p, weighted);
  }

  // Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is added separately. The
  // thread that wrote the entry writes it again.
  __device__ void at_target(int column) const {
    unit[column] = narrowed<E>(S(0));
    if (logged != nullptr) logged[column] = narrowed<E>(S(0));
  }

  __device__ void end(int64_t row, const MergeFactors<S>& factors) const { rescale[row] = factors.old_factor; }
};

template <class S, class E>
void run(const Slab& slab, const ForwardState& state, const UnitOutputs& out, Stream stream) {
  const UnitOutput<S, E> output{(E*)out.unit,       (E*)out.unit_entropy, (S*)out.rescale,    (S*)out.max_step,
                                out.unit_stride, out.entropy_stride,   Transform<S>(slab), S(0),
                                S(0)};
  const bool aligned =
      aligned_rows<E>(out.unit, out.unit_stride) && aligned_rows<E>(out.unit_entropy, out.entropy_stride);
  launch_two_looks<S, E>("slab_forward_unit", slab, state, output, aligned, stream);
}

}  // namespace

void slab_forward_unit(const Slab& slab, const ForwardState& state, const UnitOutputs& out, Stream stream) {
  WK_FOR_DTYPE(slab.operand, run, slab, state, out, stream)
}

}  // namespace cuda
}  // namespace windkern
