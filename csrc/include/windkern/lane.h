// A lane is one number (float, double) or a short vector of them; the maths below is written once for both.
// The code is plain C++17 for host and device compilers. Vector lanes are GCC vector extensions: comparisons give masks
// and `mask ? a : b` selects, so scalar and vector code look the same.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define WK_FN __host__ __device__ __forceinline__
#else
#define WK_FN inline
#endif

// Hazard: an inline function compiled for two instruction sets is one symbol to the linker, so an old CPU may run code
// for the new one. Remedy: each build of the kernels has its own namespace.
#ifndef WK_ISA
#define WK_ISA base
#endif

namespace windkern {
inline namespace WK_ISA {

template <class L>
struct LaneTraits {  // vector lanes: specialised where vectors are declared
  using Scalar = L;
  static constexpr int width = 1;
};

template <>
struct LaneTraits<float> {
  using Scalar = float;
  using Bits = int32_t;
  static constexpr int width = 1;
};

template <>
struct LaneTraits<double> {
  using Scalar = double;
  using Bits = int64_t;
  static constexpr int width = 1;
};

template <class L>
using ScalarOf = typename LaneTraits<L>::Scalar;
template <class L>
using BitsOf = typename LaneTraits<L>::Bits;

template <class To, class From>
WK_FN To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class L>
WK_FN L splat(ScalarOf<L> value) {
  return L{} + value;
}

template <class M, class L>
WK_FN L select(const M& mask, const L& a, const L& b) {
  return mask ? a : b;
}

template <class L>
WK_FN L lane_max(const L& a, const L& b) {
  // Hazard: a NaN logit must stay NaN. Remedy: an unordered b fails both tests and is returned.
  return select(a >= b, a, b);
}

template <class S>
WK_FN S minus_infinity();

template <>
WK_FN float minus_infinity<float>() {
  return bit_cast<float>(uint32_t(0xff800000u));
}

template <>
WK_FN double minus_infinity<double>() {
  return bit_cast<double>(uint64_t(0xfff0000000000000u));
}

template <class L>
WK_FN L lane_abs(const L& x) {
  return select(x < splat<L>(0), -x, x);
}

}  // namespace WK_ISA
}  // namespace windkern
