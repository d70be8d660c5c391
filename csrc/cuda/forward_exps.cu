// Forward that writes exponentials relative to a pivot that rarely moves.
#include "two_looks.h"

namespace windkern {
namespace cuda {
namespace {

template <class S, class E>
struct ExpsOutput {
  static constexpr int kTeam = kMaxTeam, kBlocks = 2;
  E* values;  // may be the slab itself
  int64_t stride, earlier;
  S *pivot, *moved;
  const int64_t* targets;
  Pivot<S> next;  // of this row, from begin()
  S factor;
  bool ignored;

  struct Looked {
    S pivot;
    bool ignored;
  };

  __device__ Looked look(int64_t row) const { return {pivot[row], targets[row] < 0}; }

  __device__ void begin(int64_t row, S slab_max, S, Looked looked) {
    values += row * stride;
    next = next_pivot(looked.pivot, slab_max);
    factor = lane_exp(slab_max - finite_shift(next.value));
    ignored = looked.ignored;
    if (next.factor != S(1)) {
      E* const before = values - earlier;
      for (int64_t i = threadIdx.x; i < earlier; i += blockDim.x) {
        before[i] = narrowed<E>(widened(before[i]) * next.factor);
      }
    }
  }

  template <class Columns, int size>
  __device__ void write(const Columns& columns, int p, const S (&)[size], const S (&e)[size], S) const {
    S scaled[size];
#pragma unroll
    for (int k = 0; k < size; ++k) scaled[k] = ignored ? S(0) : e[k] * factor;  // an ignored row can hold NaN
    store_pack(values, columns, p, scaled);
  }

  // Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is set separately. The
  // thread that wrote the entry writes it again.
  __device__ void at_target(int column) const { values[column] = narrowed<E>(S(0)); }

  __device__ void end(int64_t row, const MergeFactors<S>&) const {
    pivot[row] = next.value;
    if (moved != nullptr) moved[row] = next.factor;
  }
};

template <class S, class E>
void run(const Slab& slab, const ForwardState& state, const ExpsOutputs& out, Stream stream) {
  const ExpsOutput<S, E> output{(E*)out.values, out.stride, out.earlier, (S*)out.pivot, (S*)out.moved, slab.targets,
                                {S(0), S(1)},   S(0),       false};
  launch_two_looks<S, E>("exps_forward", slab, state, output, aligned_rows<E>(out.values, out.stride), stream);
}

}  // namespace

void exps_forward(const Slab& slab, const ForwardState& state, const ExpsOutputs& out, Stream stream) {
  WK_FOR_DTYPE(slab.operand, run, slab, state, out, stream)
}

}  // namespace cuda
}  // namespace windkern
