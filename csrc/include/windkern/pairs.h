// One ordered pair (i, j) of a group: the chance that i beats j, and the value and slope of each pair loss.
#pragma once

#include "exp.h"

namespace windkern {
inline namespace WK_ISA {

enum class Link : int { bradley_terry = 0, step = 1 };
enum class PairLoss : int { square = 0, logistic = 1, hinge = 2 };

// Chances that the first beats the second and that it does not, each to full precision.
template <class L>
struct Chances {
  L win, loss;
};

// Chances from the gap of the rewards; a tie is 1/2.
template <Link link, class L>
WK_FN Chances<L> chances_of(const L& gap) {
  using S = ScalarOf<L>;
  const L zero = splat<L>(0), one = splat<L>(1);
  if constexpr (link == Link::bradley_terry) {
    const L tail = lane_exp(L(-lane_abs(gap))), whole = S(1) + tail;
    return {L(select(gap >= zero, one, tail) / whole), L(select(gap >= zero, tail, one) / whole)};
  } else {
    const L tie = splat<L>(S(0.5));
    return {select(gap > zero, one, select(gap < zero, zero, tie)), select(gap < zero, one, select(gap > zero, zero, tie))};
  }
}

template <class L>
WK_FN Chances<L> chances_from(const L& win) {
  return {win, L(ScalarOf<L>(1) - win)};
}

// Value of the loss of the ordered pair (i, j) with score gap d = s_i - s_j and chance p, and the contribution of both
// orders of the pair, (i, j) and (j, i), to the slope in s_i.
template <PairLoss loss, class L>
WK_FN void pair_value_slope(const L& d, const Chances<L>& chances, L& value, L& slope) {
  using S = ScalarOf<L>;
  const L &p = chances.win, &q = chances.loss;
  const L zero = splat<L>(0), one = splat<L>(1);
  if constexpr (loss == PairLoss::square) {
    const L r = d - (p - S(0.5));
    value = r * r;
    slope = S(4) * r;
  } else if constexpr (loss == PairLoss::logistic) {
    const L tail = lane_exp(L(-lane_abs(d)));  // at most 1: no overflow either way
    value = p * (select(d < zero, L(-d), zero) + lane_log1p(tail));
    // Reason: the slope equals sigmoid(d) - p, which would cancel where both are near 1.
    slope = (q * select(d >= zero, one, tail) - p * select(d >= zero, tail, one)) / (S(1) + tail);
  } else {
    const L room = S(1) - d, back = S(1) + d;
    value = p * select(room > zero, room, zero);
    slope = select(back > zero, q, zero) - select(room > zero, p, zero);
  }
}

}  // namespace WK_ISA
}  // namespace windkern
