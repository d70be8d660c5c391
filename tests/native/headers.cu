// The maths headers of csrc/include compile for a device as they are: every template is used from a kernel.
#include "include/windkern/logprob.h"
#include "include/windkern/pairs.h"

using namespace windkern;

template <class S>
__global__ void uses_logprob(const S* in, S* out) {
  const int i = threadIdx.x;
  const Transform<S> t{S(1.3), S(5), S(0.7)};
  const S y = transform_logit(in[i], t);
  OnlineSoftmax<S> running{minus_infinity<S>(), S(0), S(0)};
  const MergeFactors<S> f = merge(running, OnlineSoftmax<S>{y, S(1), S(0)});
  const RowStats<S> row{running.max, lane_log(running.sum), y, running.entropy};
  const Upstream<S> c{in[0], in[1], in[2], true};
  out[i] = f.old_factor + relative_slope(y, t) + target_slope(row, c, t) + other_factor(row, c, t) + lane_tanh(y);
}

template <class S, PairLoss loss, Link link>
__global__ void uses_pairs(const S* in, S* out) {
  S value, slope;
  pair_value_slope<loss>(in[0], chance<link>(in[1]), value, slope);
  out[threadIdx.x] = value + slope;
}

template <class S>
void launch(const S* in, S* out) {
  uses_logprob<S><<<1, 32>>>(in, out);
  uses_pairs<S, PairLoss::square, Link::step><<<1, 32>>>(in, out);
  uses_pairs<S, PairLoss::logistic, Link::bradley_terry><<<1, 32>>>(in, out);
  uses_pairs<S, PairLoss::hinge, Link::step><<<1, 32>>>(in, out);
}

void launch_all(const float* a, float* b, const double* c, double* d) {
  launch(a, b);
  launch(c, d);
}
