// Row kernels over one slab: online softmax forward (scoring, kept, frozen head) and dz backward.
#pragma once

#include "../include/windkern/logprob.h"
#include "kernels.h"
#include "vectors.h"

namespace windkern {
namespace {

// Reason: below this many elements, waking a team of threads costs more than it saves.
constexpr int64_t kSerialSlab = 1 << 15;

// z (width,) becomes the transformed logits, masked where the bias is -inf; returns their maximum.
template <class S>
S transform_row(S* z, const S* bias, int64_t width, const Transform<S>& t) {
  Running<S> best(minus_infinity<S>());
  if (bias == nullptr && t.identity()) {
    for_lanes<S>(width, [&](int64_t i, auto lane) {
      using L = decltype(lane);
      auto& running = best.at(lane);
      running = lane_max(running, load<L>(z + i));
    });
    return best.max();
  }
  for_lanes<S>(width, [&](int64_t i, auto lane) {
    using L = decltype(lane);
    L y = load<L>(z + i);
    const L b = bias == nullptr ? splat<L>(0) : load<L>(bias + i);
    y = transform_logit(L(y + b), t);
    const L low = splat<L>(minus_infinity<S>());
    y = select(b == low, low, y);
    store(z + i, y);
    auto& running = best.at(lane);
    running = lane_max(running, y);
  });
  return best.max();
}

template <class S>
OnlineSoftmax<S> load_state(const ForwardState& state, int64_t row) {
  return {((S*)state.max)[row], ((S*)state.sum)[row], state.entropy ? ((S*)state.entropy)[row] : S(0)};
}

template <class S>
void store_state(const ForwardState& state, int64_t row, const OnlineSoftmax<S>& value) {
  ((S*)state.max)[row] = value.max;
  ((S*)state.sum)[row] = value.sum;
  if (state.entropy) ((S*)state.entropy)[row] = value.entropy;
}

template <class S>
void see_target(const ForwardState& state, int64_t row, const S* y, int64_t column, int64_t width) {
  if (column >= 0 && column < width) ((S*)state.target)[row] = y[column];
}

template <class S, class E>
void forward_rows(const Slab& slab, const ForwardState& state, const ForwardOutputs& out) {
  const Transform<S> t(slab);
  const int64_t W = slab.width;
  const S gain = S(1 << kept_binades<E>);
  const S log_gain = S(0.69314718055994530942 * kept_binades<E>);
#pragma omp parallel for num_threads(slab.threads) schedule(static) if (slab.rows * slab.width > kSerialSlab)
  for (int64_t row = 0; row < slab.rows; ++row) {
    S* z = (S*)slab.logits + row * slab.stride;
    E* kept = out.kept == nullptr ? nullptr : (E*)out.kept + row * out.stride;
    OnlineSoftmax<S> part{transform_row(z, (const S*)slab.bias, W, t), S(0), S(0)};
    see_target(state, row, z, slab.targets[row] - slab.start, W);
    const S shift = finite_shift(part.max);
    Running<S> sum(0), entropy(0);
    const bool wants_entropy = state.entropy != nullptr, capped = t.capped();
    for_lanes<S>(W, [&](int64_t i, auto lane) {
      using L = decltype(lane);
      const L y = load<L>(z + i), gap = y - shift;
      const L e = lane_exp(gap);
      sum.at(lane) += e;
      // Hazard: 0 * -inf where a bias masks. Remedy: only entries above 0 count.
      if (wants_entropy) entropy.at(lane) += select(e > splat<L>(0), L(e * gap), splat<L>(0));
      if (kept != nullptr) store(kept + i, L(capped ? L(e * gain) * relative_slope(y, t) : L(e * gain)));
    });
    part.sum = sum.sum();
    part.entropy = entropy.sum();
    OnlineSoftmax<S> running = load_state<S>(state, row);
    merge(running, part);
    store_state(state, row, running);
    if (kept != nullptr) ((S*)out.offset)[row] = part.max - log_gain;
  }
}

template <class S, class E>
void unit_rows(const Slab& slab, const ForwardState& state, const UnitOutputs& out) {
  const Transform<S> t(slab);
  const int64_t W = slab.width;
  const S gain = S(1 << kept_binades<E>);
#pragma omp parallel for num_threads(slab.threads) schedule(static) if (slab.rows * slab.width > kSerialSlab)
  for (int64_t row = 0; row < slab.rows; ++row) {
    S* z = (S*)slab.logits + row * slab.stride;
    E* unit = (E*)out.unit + row * out.unit_stride;
    E* logged = out.unit_entropy == nullptr ? nullptr : (E*)out.unit_entropy + row * out.entropy_stride;
    OnlineSoftmax<S> part{transform_row(z, (const S*)slab.bias, W, t), S(0), S(0)};
    const int64_t column = slab.targets[row] - slab.start;
    see_target(state, row, z, column, W);
    OnlineSoftmax<S> running = load_state<S>(state, row);
    // The factors need only the maxima; the sums of this slab join the running ones below.
    const S new_max = finite_shift(lane_max(running.max, part.max)), shift = finite_shift(part.max);
    const S factor = lane_exp(S(part.max - new_max)) * gain;
    const S step = part.max == minus_infinity<S>() ? S(0) : part.max - new_max;
    if (out.max_step) ((S*)out.max_step)[row] = running.max == minus_infinity<S>() ? S(0) : running.max - new_max;
    const bool wants_entropy = state.entropy != nullptr, capped = t.capped();
    Running<S> sum(0), entropy(0);
    for_lanes<S>(W, [&](int64_t i, auto lane) {
      using L = decltype(lane);
      const L y = load<L>(z + i), gap = y - shift, e = lane_exp(gap);
      sum.at(lane) += e;
      L weighted = e * factor;
      if (capped) weighted = weighted * relative_slope(y, t);
      if (wants_entropy) {
        entropy.at(lane) += select(e > splat<L>(0), L(e * gap), splat<L>(0));
        store(logged + i, select(e > splat<L>(0), L(weighted * (gap + step)), splat<L>(0)));
      }
      store(unit + i, weighted);  // last: unit may be the slab itself
    });
    // Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is added separately.
    if (column >= 0 && column < W) {
      store(unit + column, S(0));
      if (logged != nullptr) store(logged + column, S(0));
    }
    part.sum = sum.sum();
    part.entropy = entropy.sum();
    const MergeFactors<S> factors = merge(running, part);
    ((S*)out.rescale)[row] = factors.old_factor;
    store_state(state, row, running);
  }
}

// Exponentials relative to a pivot that the slabs of a row share; the statistics are those of forward_rows.
template <class S, class E>
void exps_forward_rows(const Slab& slab, const ForwardState& state, const ExpsOutputs& out) {
  const Transform<S> t(slab);
  const int64_t W = slab.width;
#pragma omp parallel for num_threads(slab.threads) schedule(static) if (slab.rows * slab.width > kSerialSlab)
  for (int64_t row = 0; row < slab.rows; ++row) {
    S* z = (S*)slab.logits + row * slab.stride;
    E* values = (E*)out.values + row * out.stride;
    OnlineSoftmax<S> part{transform_row(z, (const S*)slab.bias, W, t), S(0), S(0)};
    const int64_t column = slab.targets[row] - slab.start;
    const bool ignored = slab.targets[row] < 0;
    see_target(state, row, z, column, W);
    S& pivot = ((S*)out.pivot)[row];
    const Pivot<S> next = next_pivot(pivot, part.max);
    const S shift = finite_shift(part.max), factor = lane_exp(S(part.max - finite_shift(next.value)));
    Running<S> sum(0);
    for_lanes<S>(W, [&](int64_t i, auto lane) {
      using L = decltype(lane);
      const L y = load<L>(z + i), e = lane_exp(L(y - shift));
      sum.at(lane) += e;
      store(values + i, L(e * factor));  // last: the values may be the slab itself
    });
    // Hazard: an ignored row can hold NaN, and 0 * NaN is NaN in a product. Remedy: write zeros there.
    if (ignored) for_lanes<S>(W, [&](int64_t i, auto lane) { store(values + i, decltype(lane){}); });
    // Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is set separately.
    if (column >= 0 && column < W) store(values + column, S(0));
    if (next.factor != S(1)) {
      E* before = values - out.earlier;
      for_lanes<S>(out.earlier, [&](int64_t i, auto lane) {
        using L = decltype(lane);
        store(before + i, L(load<L>(before + i) * next.factor));
      });
    }
    pivot = next.value;
    if (out.moved) ((S*)out.moved)[row] = next.factor;
    part.sum = sum.sum();
    OnlineSoftmax<S> running = load_state<S>(state, row);
    merge(running, part);
    store_state(state, row, running);
  }
}

// Recomputes these exponentials, with the given entry at the target.
template <class S, class E>
void exps_backward_rows(const Slab& slab, const ExpsInputs& in) {
  const Transform<S> t(slab);
  const int64_t W = slab.width;
#pragma omp parallel for num_threads(slab.threads) schedule(static) if (slab.rows * slab.width > kSerialSlab)
  for (int64_t row = 0; row < slab.rows; ++row) {
    S* z = (S*)slab.logits + row * slab.stride;
    E* values = (E*)in.values + row * in.stride;
    if (slab.targets[row] < 0) {  // an ignored row may hold anything
      for_lanes<S>(W, [&](int64_t i, auto lane) { store(values + i, decltype(lane){}); });
      continue;
    }
    const bool plain = slab.bias == nullptr && t.identity();
    if (!plain) transform_row(z, (const S*)slab.bias, W, t);
    const S pivot = ((const S*)in.pivot)[row];
    for_lanes<S>(W, [&](int64_t i, auto lane) {
      using L = decltype(lane);
      store(values + i, L(lane_exp(L(load<L>(z + i) - pivot))));
    });
    const int64_t column = slab.targets[row] - slab.start;
    if (column >= 0 && column < W) store(values + column, ((const S*)in.entry)[row]);
  }
}

// A thread owns columns and walks down the rows, so a sum does not depend on the number of threads.
template <class S, class E>
void column_sums_of(const ColumnSums& in) {
  constexpr int64_t kColumns = 512;
  const int64_t blocks = (in.width + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(in.threads) schedule(static) if (in.rows * in.width > kSerialSlab)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kColumns, count = in.width - first < kColumns ? in.width - first : kColumns;
    S* sums = (S*)in.sums + first;
    for_lanes<S>(count, [&](int64_t i, auto lane) { store(sums + i, decltype(lane){}); });
    for (int64_t row = 0; row < in.rows; ++row) {
      const S weight = ((const S*)in.weights)[row];
      const E* values = (const E*)in.values + row * in.stride + first;
      for_lanes<S>(count, [&](int64_t i, auto lane) {
        using L = decltype(lane);
        store(sums + i, L(load<L>(sums + i) + load<L>(values + i) * weight));
      });
    }
  }
}

template <class S>
S at_or_zero(const void* values, int64_t row) {
  return values == nullptr ? S(0) : ((const S*)values)[row];
}

// Writes one row of dz from kept exp(y - offset) * slope (without entropy), or from recomputed logits; adds scale * dz
// to dbias where wanted.
template <class S, class E, class D, bool from_kept>
void backward_row(const Slab& slab, const BackwardInputs& in, const Transform<S>& t, int64_t row, S* dbias) {
  const int64_t W = slab.width;
  S* z = (S*)slab.logits + (from_kept ? 0 : row * slab.stride);
  const E* kept = (const E*)in.kept + (from_kept ? row * in.kept_stride : 0);
  D* dz = (D*)in.dz + row * in.dz_stride;
  if (slab.targets[row] < 0) {  // an ignored row may hold anything
    for_lanes<S>(W, [&](int64_t i, auto lane) { store(dz + i, decltype(lane){}); });
    return;
  }
  const RowStats<S> stats{((const S*)in.max)[row], ((const S*)in.log_sum)[row], ((const S*)in.target)[row],
                          at_or_zero<S>(in.entropy, row)};
  const Upstream<S> c{at_or_zero<S>(in.c_logp, row), at_or_zero<S>(in.c_lse, row), at_or_zero<S>(in.c_ent, row),
                      in.c_ent != nullptr};
  const S factor = other_factor(stats, c, t), entropy_factor = c.entropy * t.slope_at_zero();
  const S row_scale = in.row_scale == nullptr ? S(1) : ((const S*)in.row_scale)[row];
  const S offset = from_kept ? ((const S*)in.offset)[row] : S(0);
  const S kept_factor = from_kept ? lane_exp(S((offset - stats.max) - stats.log_sum)) : S(1);
  const bool capped = t.capped();
  if (!from_kept) transform_row(z, (const S*)slab.bias, W, t);
  const int64_t column = slab.targets[row] - slab.start;
  const bool has_target = column >= 0 && column < W;
  const S entry = has_target ? target_slope(stats, c, t) : S(0);
  S replaced = S(0);  // added to dbias at the target by the loop, and corrected below
  for_lanes<S>(W, [&](int64_t i, auto lane) {
    using L = decltype(lane);
    L d;
    if constexpr (from_kept) {
      const L e = load<L>(kept + i);
      d = (e * kept_factor) * factor;
    } else {
      const L y = load<L>(z + i);
      // Reason: max and log(sum) are subtracted one after the other because their rounded sum would cost digits.
      const L logp = (y - stats.max) - stats.log_sum;
      const L p = lane_exp(logp);
      d = p * factor;
      if (c.has_entropy) d = d - select(p > splat<L>(0), L(p * logp * entropy_factor), splat<L>(0));
      if (capped) d = d * relative_slope(y, t);
    }
    if (has_target && column >= i && column < i + LaneTraits<L>::width) {
      if constexpr (LaneTraits<L>::width == 1) {
        replaced = d;
      } else {
        replaced = d[column - i];
      }
    }
    store(dz + i, d);
    if (dbias != nullptr) store(dbias + i, L(load<L>(dbias + i) + d * row_scale));
  });
  if (has_target) {
    store(dz + column, entry);
    if (dbias != nullptr) dbias[column] += (entry - replaced) * row_scale;
  }
}

template <class S, class E, class D>
void backward_rows_to(const Slab& slab, const BackwardInputs& in) {
  const Transform<S> t(slab);
  const int64_t W = slab.width;
  const int64_t threads = slab.rows * W > kSerialSlab ? slab.threads : 1;
  Buffer<S> partial(in.dbias == nullptr ? 0 : threads * W);  // one row for each thread, summed in order
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
    const int64_t first = slab.rows * member / team, last = slab.rows * (member + 1) / team;
    S* dbias = in.dbias == nullptr ? nullptr : partial.data + member * W;
    for (int64_t row = first; row < last; ++row) {
      if (in.kept != nullptr) {
        backward_row<S, E, D, true>(slab, in, t, row, dbias);
      } else {
        backward_row<S, E, D, false>(slab, in, t, row, dbias);
      }
    }
  }
  if (in.dbias != nullptr) {
    S* total = (S*)in.dbias;
    for (int64_t i = 0; i < W; ++i) {
      total[i] = S(0);
      for (int64_t member = 0; member < threads; ++member) total[i] += partial.data[member * W + i];
    }
  }
}

template <class S, class E>
void backward_rows(const Slab& slab, const BackwardInputs& in) {
  if (in.dz_is_wide) return backward_rows_to<S, E, S>(slab, in);
  backward_rows_to<S, E, E>(slab, in);
}

// Calls body<scalar, storage>() for an operand dtype.
#define WK_FOR_DTYPE(dtype, function, ...)                        \
  switch (dtype) {                                                \
    case DType::float64: return function<double, double>(__VA_ARGS__); \
    case DType::float32: return function<float, float>(__VA_ARGS__);   \
    case DType::bfloat16: return function<float, BFloat16>(__VA_ARGS__); \
    case DType::float16: return function<float, Half>(__VA_ARGS__);    \
  }

void slab_forward(const Slab& slab, const ForwardState& state, const ForwardOutputs& out) {
  WK_FOR_DTYPE(slab.operand, forward_rows, slab, state, out)
}

void slab_forward_unit(const Slab& slab, const ForwardState& state, const UnitOutputs& out) {
  WK_FOR_DTYPE(slab.operand, unit_rows, slab, state, out)
}

void exps_forward(const Slab& slab, const ForwardState& state, const ExpsOutputs& out) {
  WK_FOR_DTYPE(slab.operand, exps_forward_rows, slab, state, out)
}

void exps_backward(const Slab& slab, const ExpsInputs& in) { WK_FOR_DTYPE(slab.operand, exps_backward_rows, slab, in) }

void column_sums(const ColumnSums& in) { WK_FOR_DTYPE(in.dtype, column_sums_of, in) }

void slab_backward(const Slab& slab, const BackwardInputs& in) { WK_FOR_DTYPE(slab.operand, backward_rows, slab, in) }

template <class S>
void segment_sums(const S* values, const int64_t* bounds, int64_t segments, S* sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t s = 0; s < segments; ++s) {
    double total = 0;  // exact to float32 rounding for any length of the sequence
    for (int64_t i = bounds[s]; i < bounds[s + 1]; ++i) total += double(values[i]);
    sums[s] = S(total);
  }
}

void segment_sum(DType dtype, const void* values, const int64_t* bounds, int64_t segments, void* sums, int threads) {
  if (dtype == DType::float64) return segment_sums((const double*)values, bounds, segments, (double*)sums, threads);
  segment_sums((const float*)values, bounds, segments, (float*)sums, threads);
}

}  // namespace
}  // namespace windkern
