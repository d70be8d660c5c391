// The maths of one row: online softmax, logit transform, and the slope of each upstream gradient.
#pragma once

#include "arguments.h"
#include "exp.h"

namespace windkern {
inline namespace WK_ISA {

// y = softcap * tanh(scale * z / softcap) / temperature, or scale * z / temperature without a softcap (softcap = 0).
// The divisions happen here, once and in double.
template <class S>
struct Transform {
  S into_tanh, from_tanh, to_tanh;  // scale / softcap, softcap / temperature, and its inverse
  S slope;
  bool is_capped, is_identity;

  explicit Transform(const Slab& slab)
      : into_tanh(slab.softcap > 0 ? S(slab.scale / slab.softcap) : S(0)),
        from_tanh(S(slab.softcap / slab.temperature)),
        to_tanh(slab.softcap > 0 ? S(slab.temperature / slab.softcap) : S(0)),
        slope(S(slab.scale / slab.temperature)),
        is_capped(slab.softcap > 0),
        is_identity(slab.softcap <= 0 && slab.scale == slab.temperature) {}

  WK_FN bool capped() const { return is_capped; }
  WK_FN bool identity() const { return is_identity; }
  WK_FN S slope_at_zero() const { return slope; }
};

template <class L>
WK_FN L transform_logit(const L& z, const Transform<ScalarOf<L>>& t) {
  if (!t.capped()) return z * t.slope_at_zero();
  return lane_tanh(L(z * t.into_tanh)) * t.from_tanh;
}

// Slope of the transform over its slope at zero, from the transformed logit: 1 - tanh^2. Masked entries (-inf) get 0.
template <class L>
WK_FN L relative_slope(const L& y, const Transform<ScalarOf<L>>& t) {
  // Reason: near saturation 1 - (y * to_tanh)^2 is all rounding. With d = 1 - |tanh|, whose difference is exact there,
  // it is d (2 - d), and exactly 0 at the bound.
  const L d = (t.from_tanh - lane_abs(y)) * t.to_tanh;
  return select(d > splat<L>(0), L(d * (ScalarOf<L>(2) - d)), splat<L>(0));
}

// Running maximum, sum of exp(y - max), and sum of exp(y - max) * (y - max) of the entries seen so far.
template <class S>
struct OnlineSoftmax {
  S max, sum, entropy;
};

template <class S>
struct MergeFactors {
  S old_factor, new_factor;
};

// Hazard: -inf - (-inf) is NaN while all entries so far are masked. Remedy: shift by 0 instead.
template <class S>
WK_FN S finite_shift(S max) {
  return max == minus_infinity<S>() ? S(0) : max;
}

// Merges the statistics of one slab (or tile) into the running ones; returns the factors of both sides.
template <class S>
WK_FN MergeFactors<S> merge(OnlineSoftmax<S>& running, const OnlineSoftmax<S>& part) {
  const S max = lane_max(running.max, part.max);
  const S shift = finite_shift(max);
  const MergeFactors<S> f{lane_exp(S(running.max - shift)), lane_exp(S(part.max - shift))};
  const S old_gap = running.max == minus_infinity<S>() ? S(0) : running.max - shift;
  const S new_gap = part.max == minus_infinity<S>() ? S(0) : part.max - shift;
  running.entropy = f.old_factor * (running.entropy + running.sum * old_gap) +
                    f.new_factor * (part.entropy + part.sum * new_gap);
  running.sum = running.sum * f.old_factor + part.sum * f.new_factor;
  running.max = max;
  return f;
}

// The value to which the exponentials of a row are relative after a slab, and the factor for earlier ones, exactly 1 if
// the pivot stays. The pivot starts at the first finite maximum and rarely moves, so that products need no rescaling.
template <class S>
struct Pivot {
  S value, factor;
};

template <class S>
WK_FN Pivot<S> next_pivot(S pivot, S slab_max) {
  const S low = minus_infinity<S>();
  if (pivot == low) return {slab_max, S(1)};  // all earlier ones are zeros
  if (!(slab_max > pivot + S(kPivotRoom))) return {pivot, S(1)};
  return {slab_max, lane_exp(S(pivot - slab_max))};
}

// 1 - p of the target without cancellation.
WK_FN float one_minus_p(float logp) { return -expm1f(logp); }
WK_FN double one_minus_p(double logp) { return -expm1(logp); }

// Logarithm of a row's sum of exponentials, to a unit in the last place; NaN stays NaN.
WK_FN float log_of_sum(float sum) { return logf(sum); }
WK_FN double log_of_sum(double sum) { return log(sum); }

// Upstream gradients of one row; 0 where there is none.
template <class S>
struct Upstream {
  S logp, lse, entropy;
  bool has_entropy;
};

// Finished statistics of one row.
template <class S>
struct RowStats {
  S max, log_sum, target, entropy;

  WK_FN S logp() const { return (target - max) - log_sum; }
};

// d loss / d logit (before the transform) at the target.
template <class S>
WK_FN S target_slope(const RowStats<S>& row, const Upstream<S>& c, const Transform<S>& t) {
  const S logp = row.logp();
  const S p = lane_exp(logp);
  S slope = c.logp * one_minus_p(logp) + c.lse * p;
  if (c.has_entropy && p > S(0)) slope -= c.entropy * p * (logp + row.entropy);
  if (t.capped()) slope *= relative_slope(row.target, t);
  return slope * t.slope_at_zero();
}

// Factor of p at every other entry, without the log p term.
template <class S>
WK_FN S other_factor(const RowStats<S>& row, const Upstream<S>& c, const Transform<S>& t) {
  return (c.lse - c.logp - (c.has_entropy ? c.entropy * row.entropy : S(0))) * t.slope_at_zero();
}

}  // namespace WK_ISA
}  // namespace windkern
