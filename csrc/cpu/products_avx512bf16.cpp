// bfloat16 products with vdpbf16ps: each step multiplies a pair along `inner` for 16 columns and adds it in float32.
// A row is summed in one fixed order, independent of the other rows, so results do not depend on the row count.
#include "products.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "pack_bf16.h"

namespace windkern {
namespace {

constexpr int kRows = 6;                   // rows and vectors of a register tile: 24 sums, 4 vectors of B, 1 of A
constexpr int kVectors = kPanel / 16;
constexpr int64_t kBlockRows = 8 * kRows;  // rows of A that pass over all of B together
constexpr int64_t kChunkPairs = 512;       // of `inner` at a time: 128 KiB of B stay in the second-level cache
// Tasks of a thread. Reason: it waits for the last one of the others, and 512 rows are only 11 blocks. A task packs its
// rows of a transposed A again.
constexpr int64_t kTasks = 24, kPackedTasks = 4;

// Packs rows of A stored as (inner, rows): out[tile][pair][row of the tile].
void pack_rows(const Product& p, int64_t first, int64_t count, uint32_t* out) {
  const int64_t pairs = (p.inner + 1) / 2;
  alignas(64) uint32_t line[kBlockRows];
  for (int64_t k = 0; k < pairs; ++k) {
    const uint16_t* even = p.a + 2 * k * p.a_stride + first;
    const uint16_t* odd = 2 * k + 1 < p.inner ? even + p.a_stride : nullptr;
    for (int64_t j = 0; j < kBlockRows; j += 16) {
      _mm512_store_si512(line + j, interleave(even + j, odd == nullptr ? nullptr : odd + j, mask_of(count - j)));
    }
    for (int64_t tile = 0; tile * kRows < count; ++tile) {
      memcpy(out + (tile * pairs + k) * kRows, line + tile * kRows, kRows * sizeof(uint32_t));
    }
  }
}

// A as the register tile reads it: pair k of row r.
struct RowsOfA {
  const uint16_t* data;
  int64_t stride;
  __m512bh pair(int64_t k, int r) const {
    int32_t value;
    memcpy(&value, data + r * stride + 2 * k, 4);
    return (__m512bh)_mm512_set1_epi32(value);
  }
  __m512bh last(int64_t k, int r) const { return (__m512bh)_mm512_set1_epi32(data[r * stride + 2 * k]); }
};

struct PackedA {
  const uint32_t* data;
  __m512bh pair(int64_t k, int r) const { return (__m512bh)_mm512_set1_epi32(int32_t(data[k * kRows + r])); }
  __m512bh last(int64_t k, int r) const { return pair(k, r); }  // its odd half is 0
};

// c (R, panel) = A B over `pairs` pairs, and half a pair more if `half`; adds to c if `add`.
template <int R, class A>
void multiply_tile(const A& a, const uint32_t* b, int64_t pairs, bool half, float* c, int64_t stride, int64_t width,
                   bool add) {
  __m512 sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kVectors; ++j) {
      sum[r][j] = add ? _mm512_maskz_loadu_ps(mask_of(width - 16 * j), c + r * stride + 16 * j) : _mm512_setzero_ps();
    }
  }
  __m512bh columns[kVectors];
  for (int64_t k = 0; k < pairs; ++k) {
    for (int j = 0; j < kVectors; ++j) columns[j] = (__m512bh)_mm512_load_si512(b + k * kPanel + 16 * j);
    for (int r = 0; r < R; ++r) {
      const __m512bh x = a.pair(k, r);
      for (int j = 0; j < kVectors; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, columns[j]);
    }
  }
  if (half) {
    for (int j = 0; j < kVectors; ++j) columns[j] = (__m512bh)_mm512_load_si512(b + pairs * kPanel + 16 * j);
    for (int r = 0; r < R; ++r) {
      const __m512bh x = a.last(pairs, r);
      for (int j = 0; j < kVectors; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, columns[j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kVectors; ++j) {
      _mm512_mask_storeu_ps(c + r * stride + 16 * j, mask_of(width - 16 * j), sum[r][j]);
    }
  }
}

template <class A>
void multiply_rows(int64_t rows, const A& a, const uint32_t* b, int64_t pairs, bool half, float* c, int64_t stride,
                   int64_t width, bool add) {
  switch (rows) {
    case 1: return multiply_tile<1>(a, b, pairs, half, c, stride, width, add);
    case 2: return multiply_tile<2>(a, b, pairs, half, c, stride, width, add);
    case 3: return multiply_tile<3>(a, b, pairs, half, c, stride, width, add);
    case 4: return multiply_tile<4>(a, b, pairs, half, c, stride, width, add);
    case 5: return multiply_tile<5>(a, b, pairs, half, c, stride, width, add);
    default: return multiply_tile<6>(a, b, pairs, half, c, stride, width, add);
  }
}

// Computes rows first .. first + count of C over the panels begin .. end.
void multiply_block(const Product& p, int64_t first, int64_t count, int64_t begin, int64_t end, uint32_t* packed_a,
                    float* scratch) {
  const int64_t pairs = (p.inner + 1) / 2;
  if (p.a_transposed) pack_rows(p, first, count, packed_a);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPanel, width = smaller(kPanel, p.columns - column);
    float* c = p.c_is_float ? (float*)p.c + first * p.c_stride + column : scratch;
    const int64_t stride = p.c_is_float ? p.c_stride : kPanel;
    int64_t k = 0;
    do {  // at least once: an empty sum is 0
      const int64_t chunk = smaller(kChunkPairs, pairs - k);
      const bool half = k + chunk == pairs && p.inner % 2 == 1, add = k > 0 || p.accumulate;
      const uint32_t* b = p.packed + (panel * padded_pairs(p.inner) + k) * kPanel;
      for (int64_t row = 0; row < count; row += kRows) {
        const int64_t rows = smaller(kRows, count - row);
        if (p.a_transposed) {
          const PackedA a{packed_a + (row / kRows * pairs + k) * kRows};
          multiply_rows(rows, a, b, chunk - half, half, c + row * stride, stride, width, add);
        } else {
          const RowsOfA a{p.a + (first + row) * p.a_stride + 2 * k, p.a_stride};
          multiply_rows(rows, a, b, chunk - half, half, c + row * stride, stride, width, add);
        }
      }
      k += kChunkPairs;
    } while (k < pairs);
    if (!p.c_is_float) round_rows(scratch, count, width, (uint16_t*)p.c + first * p.c_stride + column, p.c_stride);
  }
}

void multiply(const Product& p) {
  const int64_t packed_a = p.a_transposed ? kBlockRows * ((p.inner + 1) / 2) * 4 : 0;
  const int64_t rounded = p.c_is_float ? 0 : kBlockRows * kPanel * 4;
  const auto none = [] {};
  over_blocks(
      p, kBlockRows, p.a_transposed ? kPackedTasks : kTasks, packed_a + rounded, none,
      [&](void* scratch, int64_t first, int64_t count, int64_t begin, int64_t end) {
        float* sums = (float*)scratch;  // first, for its alignment
        multiply_block(p, first, count, begin, end, (uint32_t*)((char*)scratch + rounded), sums);
      },
      none);
}

}  // namespace

MultiplyBf16 avx512bf16_product() { return multiply; }

}  // namespace windkern
#else  // built for another kind of CPU, or by an older compiler

namespace windkern {
MultiplyBf16 avx512bf16_product() { return nullptr; }
}  // namespace windkern
#endif
