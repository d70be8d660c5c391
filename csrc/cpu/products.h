// Matrix products of bfloat16 operands with float32 sums, which no library of torch provides on a CPU.
#pragma once

#include <cstdint>

namespace windkern {

// C (rows, columns) = A (rows, inner) B (inner, columns), or C += A B. Operands are bfloat16.
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

// Pairs in a panel, padded with zeros to whole tiles of 16.
inline int64_t padded_pairs(int64_t inner) { return (inner + 31) / 32 * 16; }

inline int64_t packed_size(int64_t columns, int64_t inner) {
  return (columns + kPanel - 1) / kPanel * kPanel * padded_pairs(inner);
}

using MultiplyBf16 = void (*)(const Product&);

// Null if the build has none; the caller must check whether the CPU can run it.
MultiplyBf16 amx_product();
MultiplyBf16 avx512bf16_product();

}  // namespace windkern
