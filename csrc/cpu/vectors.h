// Vector lanes of the width that this translation unit is compiled for, with their loads and stores.
#pragma once

#include <cstdlib>

#include "../include/windkern/storage.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WK_BYTES 64
#elif defined(__AVX2__)
#define WK_BYTES 32
#else
#define WK_BYTES 16
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
  if constexpr (LaneTraits<L>::width == 1) {
    to->bits = bfloat16_bits(value);
  } else {
    using B = BitsOf<L>;
    const B bits = bit_cast<B>(value);
    B rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = select(value != value, B{} + 0x7fc0, rounded);
    const FloatHalves halves = __builtin_convertvector(rounded, FloatHalves);
    memcpy(to, &halves, sizeof(halves));
  }
}

template <class L>
inline L load(const BFloat16* from) {
  if constexpr (LaneTraits<L>::width == 1) {
    return bfloat16_value(from->bits);
  } else {
    FloatHalves halves;
    memcpy(&halves, from, sizeof(halves));
    typedef uint32_t Wide __attribute__((vector_size(WK_BYTES)));
    return bit_cast<L>(Wide(__builtin_convertvector(halves, Wide) << 16));
  }
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

// Zeroed scratch. Reason: code of std::vector emitted here with newer instructions could be used by the whole library.
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
