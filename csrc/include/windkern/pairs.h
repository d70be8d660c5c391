// One ordered pair (i, j) of a group: the chance that i beats j, and each pair loss's value and slope.
#pragma once

#include "exp.h"

namespace windkern {
inline namespace WK_ISA {

enum class Link : int { bradley_terry = 0, step = 1 };
enum class PairLoss : int { square = 0, logistic = 1, hinge = 2 };

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

// Value of the loss of the ordered pair (i, j) with score gap d = s_i - s_j and chance p, and what both orders of the
// pair, (i, j) and (j, i), add to the slope in s_i.
template <PairLoss loss, class L>
WK_FN void pair_value_slope(const L& d, const L& p, L& value, L& slope) {
  using S = ScalarOf<L>;
  const L zero = splat<L>(0), one = splat<L>(1);
  if constexpr (loss == PairLoss::square) {
    const L r = d - (p - S(0.5));
    value = r * r;
    slope = S(4) * r;
  } else if constexpr (loss == PairLoss::logistic) {
    const L tail = lane_exp(L(-lane_abs(d)));  // at most 1: no overflow either way
    value = p * (select(d < zero, L(-d), zero) + lane_log(L(S(1) + tail)));
    slope = select(d >= zero, one, tail) / (S(1) + tail) - p;
  } else {
    const L room = S(1) - d, back = S(1) + d;
    value = p * select(room > zero, room, zero);
    slope = select(back > zero, L(S(1) - p), zero) - select(room > zero, p, zero);
  }
}

}  // namespace WK_ISA
}  // namespace windkern
