// The 16-bit formats in which kept values, unit operands and dz are stored; arithmetic is in float.
#pragma once

#include "lane.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace windkern {
inline namespace WK_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

// The largest exp(z - maximum) is stored at the top of float16's range: see contract.py.
template <class E>
constexpr int kept_binades = SameType<E, Half>::value ? 15 : 0;

// Round to nearest even; NaN keeps a set bit.
WK_FN uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? uint16_t(0x7fc0) : uint16_t(rounded);
}

WK_FN float bfloat16_value(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// In software if there is no instruction for it.
WK_FN uint16_t half_bits(float value) {
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

WK_FN float half_value(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#elif defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  const float value = bit_cast<float>(uint32_t(magnitude << 13)) * 5.192296858534828e33f;  // 2^112
  return sign ? -value : value;
#endif
}

// Two numbers in one word, the first in its low half.
WK_FN uint32_t pair_word(float low, float high, BFloat16) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return uint32_t(bfloat16_bits(low)) | uint32_t(bfloat16_bits(high)) << 16;
#endif
}

WK_FN uint32_t pair_word(float low, float high, Half) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return uint32_t(half_bits(low)) | uint32_t(half_bits(high)) << 16;
#endif
}

WK_FN float low_value(uint32_t word, BFloat16) { return bit_cast<float>(word << 16); }
WK_FN float high_value(uint32_t word, BFloat16) { return bit_cast<float>(word & 0xffff0000u); }
WK_FN float low_value(uint32_t word, Half) { return half_value(uint16_t(word & 0xffffu)); }
WK_FN float high_value(uint32_t word, Half) { return half_value(uint16_t(word >> 16)); }

// One number in its storage format.
WK_FN float widened(float value) { return value; }
WK_FN double widened(double value) { return value; }
WK_FN float widened(BFloat16 value) { return bfloat16_value(value.bits); }
WK_FN float widened(Half value) { return half_value(value.bits); }

template <class E, class S>
WK_FN E narrowed(S value) {
  if constexpr (SameType<E, float>::value || SameType<E, double>::value) {
    return E(value);
  } else {
    const float single = float(value);
    return E{uint16_t(pair_word(single, single, E{}) & 0xffffu)};
  }
}

}  // namespace WK_ISA
}  // namespace windkern
