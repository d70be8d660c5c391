// Matrix products of bfloat16 operands with float32 sums, which no library of torch offers on a CPU.
#pragma once

#include <cstdint>

namespace windkern {

// C (rows, columns) = A (rows, inner) B (inner, columns), or C += that. Operands are bfloat16.
struct Product {
  int64_t rows, columns, inner;
  const uint16_t* a;
  int64_t a_stride;      // elements between rows of what is stored
  bool a_transposed;     // A is stored as (inner, rows)
  const uint16_t* b;
  int64_t b_stride;
  bool b_transposed;     // B is stored as (columns, inner)
  void* c;
  int64_t c_stride;
  bool c_is_float;       // float32, else bfloat16
  bool accumulate;       // float32 only
  uint32_t* packed;      // packed_size(columns, inner) numbers of scratch, 64-byte aligned
  int threads;
};

// B is repacked in panels of this many columns; pairs of neighbours along `inner` share 32 bits.
constexpr int64_t kPanel = 64;

// Pairs of a panel, with zeros up to whole tiles of 16.
inline int64_t padded_pairs(int64_t inner) { return (inner + 31) / 32 * 16; }

inline int64_t packed_size(int64_t columns, int64_t inner) {
  return (columns + kPanel - 1) / kPanel * kPanel * padded_pairs(inner);
}

using MultiplyBf16 = void (*)(const Product&);

// Null where the build has none; whether the CPU can run it is the caller's question.
MultiplyBf16 amx_product();
MultiplyBf16 avx512bf16_product();

}  // namespace windkern
