// Vector lanes of the width this translation unit is compiled for, and how they are loaded and stored.
#pragma once

#include <cstdlib>

#include "../include/windkern/lane.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WK_BYTES 64
#elif defined(__AVX2__)
#define WK_BYTES 32
#else
#define WK_BYTES 16
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace windkern {
inline namespace WK_ISA {

typedef float FloatVec __attribute__((vector_size(WK_BYTES)));
typedef int32_t FloatBits __attribute__((vector_size(WK_BYTES)));
typedef uint16_t FloatHalves __attribute__((vector_size(WK_BYTES / 2)));
typedef double DoubleVec __attribute__((vector_size(WK_BYTES)));
typedef int64_t DoubleBits __attribute__((vector_size(WK_BYTES)));

template <>
struct LaneTraits<FloatVec> {
  using Scalar = float;
  using Bits = FloatBits;
  static constexpr int width = WK_BYTES / 4;
};

template <>
struct LaneTraits<DoubleVec> {
  using Scalar = double;
  using Bits = DoubleBits;
  static constexpr int width = WK_BYTES / 8;
};

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVec;
};
template <>
struct VectorOf<double> {
  using type = DoubleVec;
};

// Storage types of kept probabilities and of dz: the lane's own, or 16 bits of one of two formats.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class L, class S>
inline L load(const S* from) {
  static_assert(sizeof(S) == sizeof(ScalarOf<L>), "load of the lane's own type");
  L value;
  memcpy(&value, from, sizeof(L));
  return value;
}

template <class L, class S>
inline void store(S* to, const L& value) {
  memcpy(to, &value, sizeof(L));
}

// bfloat16: round to nearest even; NaN keeps a set bit.
template <class L>
inline void store(BFloat16* to, const L& value) {
  using B = BitsOf<L>;
  const B bits = bit_cast<B>(value);
  B rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = select(value != value, B{} + 0x7fc0, rounded);
  if constexpr (LaneTraits<L>::width == 1) {
    to->bits = uint16_t(rounded);
  } else {
    const FloatHalves halves = __builtin_convertvector(rounded, FloatHalves);
    memcpy(to, &halves, sizeof(halves));
  }
}

template <class L>
inline L load(const BFloat16* from) {
  if constexpr (LaneTraits<L>::width == 1) {
    return bit_cast<L>(uint32_t(from->bits) << 16);
  } else {
    FloatHalves halves;
    memcpy(&halves, from, sizeof(halves));
    typedef uint32_t Wide __attribute__((vector_size(WK_BYTES)));
    return bit_cast<L>(Wide(__builtin_convertvector(halves, Wide) << 16));
  }
}

// float16 one number at a time, in software where the CPU has no conversion: not a fast path on a CPU.
inline uint16_t half_bits(float value) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(value, 0));
#else
  const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                  // subnormal: let the float adder round
    const float scaled = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(scaled) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
#endif
}

inline float half_value(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  const float value = bit_cast<float>(uint32_t(magnitude << 13)) * 5.192296858534828e33f;  // 2^112
  return sign ? -value : value;
#endif
}

template <class L>
inline void store(Half* to, const L& value) {
  if constexpr (LaneTraits<L>::width == 1) {
    to->bits = half_bits(float(value));
  } else {
    for (int k = 0; k < LaneTraits<L>::width; ++k) to[k].bits = half_bits(float(value[k]));
  }
}

template <class L>
inline L load(const Half* from) {
  if constexpr (LaneTraits<L>::width == 1) {
    return half_value(from->bits);
  } else {
    L value{};
    for (int k = 0; k < LaneTraits<L>::width; ++k) value[k] = half_value(from[k].bits);
    return value;
  }
}

inline float reduce_add(float value) { return value; }
inline double reduce_add(double value) { return value; }
inline float reduce_max(float value) { return value; }
inline double reduce_max(double value) { return value; }

// Pairwise, so that the result does not depend on how the compiler orders a loop.
template <class V>
inline ScalarOf<V> reduce_add(V value) {
  for (int step = LaneTraits<V>::width / 2; step > 0; step /= 2) {
    for (int k = 0; k < step; ++k) value[k] += value[k + step];
  }
  return value[0];
}

template <class V>
inline ScalarOf<V> reduce_max(V value) {
  ScalarOf<V> best = value[0];
  for (int k = 1; k < LaneTraits<V>::width; ++k) best = lane_max(best, value[k]);
  return best;
}

// Zeroed scratch. Own, because code of std::vector emitted here with newer instructions could serve the whole library.
template <class S>
struct Buffer {
  S* data;

  explicit Buffer(int64_t count) : data(count > 0 ? (S*)calloc(count, sizeof(S)) : nullptr) {
    if (count > 0 && data == nullptr) abort();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

// A running value for the vector part of a loop and one for its tail.
template <class S>
struct Running {
  typename VectorOf<S>::type vector;
  S scalar;

  explicit Running(S start) : vector(splat<typename VectorOf<S>::type>(start)), scalar(start) {}
  typename VectorOf<S>::type& at(const typename VectorOf<S>::type&) { return vector; }
  S& at(const S&) { return scalar; }
  S sum() const { return reduce_add(vector) + scalar; }
  S max() const { return lane_max(reduce_max(vector), scalar); }
};

// Calls body(index, lane) for whole vectors of 0 .. count, then for single numbers.
template <class S, class F>
inline void for_lanes(int64_t count, F&& body) {
  using V = typename VectorOf<S>::type;
  int64_t i = 0;
  for (; i + LaneTraits<V>::width <= count; i += LaneTraits<V>::width) body(i, V{});
  for (; i < count; ++i) body(i, S{});
}

}  // namespace WK_ISA
}  // namespace windkern
