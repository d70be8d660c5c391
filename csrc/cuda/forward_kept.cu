#include "kept.h"
#include "two_looks.h"

namespace windkern {
namespace cuda {
namespace {

template <class S, class E>
struct KeptOutput {
  static constexpr int kTeam = kMaxTeam, kBlocks = 2;
  E* kept;
  S* offset;
  int64_t width;
  Transform<S> t;

  __device__ void begin(int64_t row, S slab_max, S) {
    constexpr double log_gain = 0.69314718055994530942 * kept_binades<E>;
    kept += row * width;
    if (threadIdx.x == 0) offset[row] = slab_max - S(log_gain);
  }

  template <class Columns, int size>
  __device__ void write(const Columns& columns, int p, const S (&y)[size], const S (&e)[size], S) const {
    S scaled[size];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      scaled[k] = e[k] * S(1 << kept_binades<E>);
      if (t.capped()) scaled[k] *= relative_slope(y[k], t);
    }
    store_pack(kept, columns, p, scaled);
  }

  __device__ void at_target(int) const {}
  __device__ void end(int64_t, const MergeFactors<S>&) const {}
};

template <class S, class E>
void run(const Slab& slab, const ForwardState& state, const ForwardOutputs& out, Stream stream) {
  const KeptOutput<S, E> output{(E*)out.kept, (S*)out.offset, slab.width, Transform<S>(slab)};
  launch_two_looks<S, E>("slab_forward (kept)", slab, state, output, aligned16(out.kept), stream);
}

}  // namespace

void slab_forward_kept(const Slab& slab, const ForwardState& state, const ForwardOutputs& out, Stream stream) {
  WK_FOR_DTYPE(slab.operand, run, slab, state, out, stream)
}

}  // namespace cuda
}  // namespace windkern
