// exp, log, log1p and tanh of a lane: polynomials on vectors and on the host, hardware functions on a device.
#pragma once

#include "lane.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace windkern {
inline namespace WK_ISA {

template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float low = -87.33654f, high = 88.72283f;
  static constexpr int mantissa = 23, terms = 7;
  static constexpr int32_t one = 0x3f800000, step = 1 << 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double magic = 6755399441055744.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double low = -708.3964, high = 709.7827;
  static constexpr int mantissa = 52, terms = 13;
  static constexpr int64_t one = 0x3ff0000000000000, step = int64_t(1) << 52;
};

template <class S>
constexpr S inverse_factorial(int k) {
  double product = 1;
  for (int j = 2; j <= k; ++j) product *= j;
  return S(1 / product);
}

// exp(x) for x up to ln(2) * 127.5, within 2 units in the last place; exactly 0 below the smallest normal number, so
// -inf gives 0; NaN stays NaN.
template <class L>
WK_FN L lane_exp(const L& x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  using S = ScalarOf<L>;
  using B = BitsOf<L>;
  using C = ExpConstants<S>;
  const L bounded = select(x < splat<L>(C::low), splat<L>(C::low), select(x > splat<L>(C::high), splat<L>(C::high), x));
  const L shifted = bounded * S(1.44269504088896340736) + splat<L>(C::magic);
  const L n = shifted - splat<L>(C::magic);
  const L r = (bounded - n * C::ln2_high) - n * C::ln2_low;
  // Taylor series: |r| <= ln(2) / 2, so the first omitted term is below half a unit in the last place.
  L series = splat<L>(inverse_factorial<S>(C::terms));
  for (int k = C::terms - 1; k >= 0; --k) series = series * r + inverse_factorial<S>(k);
  const B exponent = (bit_cast<B>(shifted) - bit_cast<B>(splat<L>(C::magic))) * C::step + C::one;
  const L result = series * bit_cast<L>(exponent);
  const L finite = select(x < splat<L>(C::low), splat<L>(0), select(x > splat<L>(C::high), splat<L>(-minus_infinity<S>()), result));
  return select(x != x, x, finite);
#endif
}

// log(x) for x >= 0 within 3 units in the last place of max(1, |log x|); log(0) = -inf.
template <class L>
WK_FN L lane_log(const L& x) {
#if defined(__CUDA_ARCH__)
  return log(x);
#else
  using S = ScalarOf<L>;
  using B = BitsOf<L>;
  using C = ExpConstants<S>;
  // x = m * 2^n with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are subtracted first to get this range.
  const B root = bit_cast<B>(splat<L>(S(0.70710678118654752440)));
  const B bits = bit_cast<B>(x);
  const B n = (bits - root) >> C::mantissa;
  const L m = bit_cast<L>(bits - n * C::step);
  L power{};
  if constexpr (LaneTraits<L>::width == 1) {
    power = S(n);
  } else {
    power = __builtin_convertvector(n, L);
  }
  const L s = (m - S(1)) / (m + S(1));
  const L s2 = s * s;
  L series = splat<L>(0);
  for (int k = (sizeof(S) == 4 ? 11 : 25); k >= 3; k -= 2) series = (series + S(S(1) / S(k))) * s2;
  const L log_m = S(2) * s * (series + S(1));
  const L result = power * C::ln2_high + (power * C::ln2_low + log_m);
  return select(x <= splat<L>(0), splat<L>(minus_infinity<S>()), result);
#endif
}

// log(1 + x) for x in [0, 1] with a small relative error: the quotient corrects the rounding of 1 + x.
template <class L>
WK_FN L lane_log1p(const L& x) {
#if defined(__CUDA_ARCH__)
  return log1p(x);
#else
  using S = ScalarOf<L>;
  const L u = S(1) + x, excess = u - S(1);
  const L none = splat<L>(0);
  return select(excess == none, x, L(lane_log(u) * (x / select(excess == none, splat<L>(S(1)), excess))));
#endif
}

template <class L>
WK_FN L lane_tanh(const L& x) {
#if defined(__CUDA_ARCH__)
  return tanh(x);
#else
  using S = ScalarOf<L>;
  // Far from 0 the slope depends on the difference from 1, which is therefore subtracted last.
  const L size = lane_abs(x), e = lane_exp(S(2) * size), one = splat<L>(1);
  const L quotient = select(size > splat<L>(0.55), splat<L>(2), L(e - one)) / (e + one);
  const L positive = select(size > splat<L>(0.55), L(one - quotient), quotient);
  const L far = select(x < splat<L>(0), L(-positive), positive);
  // Near 0 the quotient above loses relative digits, and the odd series does not.
  const L x2 = x * x;
  const L near = x + x * x2 *
                         (S(-1.0 / 3) +
                          x2 * (S(2.0 / 15) + x2 * (S(-17.0 / 315) + x2 * (S(62.0 / 2835) + x2 * S(-1382.0 / 155925)))));
  const L limit = splat<L>(S(sizeof(S) == 4 ? 0.15 : 0.02));
  return select(size < limit, near, far);
#endif
}

}  // namespace WK_ISA
}  // namespace windkern
