// One ordered pair (i, j) of a group: the chance that i beats j, and each pair loss's value and slope.
#pragma once

#include "exp.h"

namespace windkern {
inline namespace WK_ISA {

enum class Link : int { bradley_terry = 0, step = 1 };
enum class PairLoss : int { square = 0, logistic = 1, hinge = 2 };

// log(1 + exp(x)) without overflow, and its slope, the logistic function.
template <class L>
WK_FN L softplus(const L& x) {
  using S = ScalarOf<L>;
  const L tail = lane_exp(-lane_abs(x));
  return select(x > splat<L>(0), x, splat<L>(0)) + lane_log(L(S(1) + tail));
}

template <class L>
WK_FN L sigmoid(const L& x) {
  using S = ScalarOf<L>;
  const L tail = lane_exp(-lane_abs(x));
  return select(x >= splat<L>(0), splat<L>(S(1)), tail) / (S(1) + tail);
}

// Chance that the first beats the second, from the gap of their rewards; a tie is 1/2.
template <Link link, class L>
WK_FN L chance(const L& gap) {
  using S = ScalarOf<L>;
  if constexpr (link == Link::bradley_terry) return sigmoid(gap);
  return select(gap > splat<L>(0), splat<L>(S(1)), select(gap < splat<L>(0), splat<L>(0), splat<L>(S(0.5))));
}

// Value of the loss of an ordered pair with score gap d and chance p, and its slope in d.
template <PairLoss loss, class L>
WK_FN void pair_value_slope(const L& d, const L& p, L& value, L& slope) {
  using S = ScalarOf<L>;
  if constexpr (loss == PairLoss::square) {
    const L r = d - (p - S(0.5));
    value = r * r;
    slope = S(2) * r;
  } else if constexpr (loss == PairLoss::logistic) {
    value = p * softplus(L(-d));
    slope = -p * sigmoid(L(-d));
  } else {
    const L room = S(1) - d;
    value = p * select(room > splat<L>(0), room, splat<L>(0));
    slope = -p * select(room > splat<L>(0), splat<L>(S(1)), splat<L>(0));
  }
}

}  // namespace WK_ISA
}  // namespace windkern
