// All ordered pairs of each group in O(n) memory: win rates, and the loss's value and slope in one pass.
#pragma once

#include "../include/windkern/pairs.h"
#include "kernels.h"
#include "vectors.h"

namespace windkern {
namespace {

// Reason: below this many elements, waking a team of threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 15;

// Chances of response i against the responses of lane j.
template <class S, Link link, class L>
Chances<L> chances(const Pairs& in, int64_t group, int64_t i, int64_t j) {
  if (in.rewards == nullptr) return chances_from(load<L>((const S*)in.prefs + (group * in.n + i) * in.n + j));
  const S* rewards = (const S*)in.rewards + group * in.n;
  return chances_of<link>(L(splat<L>(rewards[i]) - load<L>(rewards + j)));
}

// 1 if response j counts, else 0.
template <class L>
L counted(const bool* where, int64_t j) {
  if (where == nullptr) return splat<L>(1);
  if constexpr (LaneTraits<L>::width == 1) {
    return L(where[j]);
  } else {
    L mask{};
    for (int k = 0; k < LaneTraits<L>::width; ++k) mask[k] = where[j + k] ? 1 : 0;
    return mask;
  }
}

// Sets `value` for response i itself if it is among those of lane j.
template <class L>
void set_own(L& lanes, int64_t i, int64_t j, ScalarOf<L> value) {
  if constexpr (LaneTraits<L>::width == 1) {
    if (i == j) lanes = value;
  } else {
    if (i >= j && i < j + LaneTraits<L>::width) lanes[i - j] = value;
  }
}

template <class S, Link link, PairLoss loss>
void pair_terms_of(const Pairs& in, S* value, S* slope) {
  Buffer<double> row_value(in.groups * in.n);
#pragma omp parallel for num_threads(in.threads) schedule(static) if (in.groups * in.n * in.n > kSerialWork)
  for (int64_t place = 0; place < in.groups * in.n; ++place) {
    const int64_t group = place / in.n, i = place % in.n;
    const bool* where = in.where == nullptr ? nullptr : in.where + group * in.n;
    slope[place] = S(0);
    if (where != nullptr && !where[i]) continue;
    const S* scores = (const S*)in.scores + group * in.n;
    Running<S> values(0), slopes(0);
    for_lanes<S>(in.n, [&](int64_t j, auto lane) {
      using L = decltype(lane);
      L value, slope;
      const L gap = splat<L>(scores[i]) - load<L>(scores + j);
      pair_value_slope<loss>(gap, chances<S, link, L>(in, group, i, j), value, slope);
      // Hazard: a masked score can be NaN or inf, and adding and subtracting a term loses the digits of small losses.
      // Remedy: select; never multiply by 0, never subtract the pair (i, i).
      L one = counted<L>(where, j);
      set_own(one, i, j, S(0));
      values.at(lane) += select(one > splat<L>(0), value, splat<L>(0));
      slopes.at(lane) += select(one > splat<L>(0), slope, splat<L>(0));
    });
    row_value.data[place] = double(values.sum());
    slope[place] = slopes.sum();
  }
  for (int64_t group = 0; group < in.groups; ++group) {
    double total = 0;
    for (int64_t i = 0; i < in.n; ++i) total += row_value.data[group * in.n + i];
    value[group] = S(total);
  }
}

template <class S, Link link>
void win_rates_of(const Pairs& in, S* rates) {
#pragma omp parallel for num_threads(in.threads) schedule(static) if (in.groups * in.n * in.n > kSerialWork)
  for (int64_t place = 0; place < in.groups * in.n; ++place) {
    const int64_t group = place / in.n, i = place % in.n;
    const bool* where = in.where == nullptr ? nullptr : in.where + group * in.n;
    rates[place] = S(0);
    if (where != nullptr && !where[i]) continue;
    Running<S> wins(0), count(0);
    for_lanes<S>(in.n, [&](int64_t j, auto lane) {
      using L = decltype(lane);
      const L one = counted<L>(where, j);
      L win = chances<S, link, L>(in, group, i, j).win;
      set_own(win, i, j, S(0.5));
      wins.at(lane) += select(one > splat<L>(0), win, splat<L>(0));
      count.at(lane) += one;
    });
    rates[place] = wins.sum() / count.sum();
  }
}

template <class S, Link link>
void pair_terms_link(const Pairs& in, S* value, S* slope) {
  switch (PairLoss(in.loss)) {
    case PairLoss::square: return pair_terms_of<S, link, PairLoss::square>(in, value, slope);
    case PairLoss::logistic: return pair_terms_of<S, link, PairLoss::logistic>(in, value, slope);
    case PairLoss::hinge: return pair_terms_of<S, link, PairLoss::hinge>(in, value, slope);
  }
}

template <class S>
void pair_terms_scalar(const Pairs& in, void* value, void* slope) {
  if (Link(in.link) == Link::step) return pair_terms_link<S, Link::step>(in, (S*)value, (S*)slope);
  pair_terms_link<S, Link::bradley_terry>(in, (S*)value, (S*)slope);
}

template <class S>
void win_rates_scalar(const Pairs& in, void* rates) {
  if (Link(in.link) == Link::step) return win_rates_of<S, Link::step>(in, (S*)rates);
  win_rates_of<S, Link::bradley_terry>(in, (S*)rates);
}

void pair_terms(const Pairs& in, void* value, void* slope) {
  if (in.dtype == DType::float64) return pair_terms_scalar<double>(in, value, slope);
  pair_terms_scalar<float>(in, value, slope);
}

void win_rates(const Pairs& in, void* rates) {
  if (in.dtype == DType::float64) return win_rates_scalar<double>(in, rates);
  win_rates_scalar<float>(in, rates);
}

}  // namespace
}  // namespace windkern
